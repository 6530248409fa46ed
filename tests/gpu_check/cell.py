"""What every cell of `make gpu-check` is given, and where random models and pairs come from."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.experiment import Config
from pipeline.forward.trees import Tree
from pipeline.hardware import device_kind
from pipeline.training.inputs.pairs import Pairs
from tests.benchmarks.shapes import LLAMA_1B, LLAMA_8B, write_random_model
from tests.benchmarks.trl_training import embedded

# as large as the embedded tokenizer's vocabulary
TINY = LLAMA_1B | {
    "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {"tiny": TINY, "1B": LLAMA_1B, "8B": LLAMA_8B}


class FellShort(Exception):
    """A bound was missed; the message says which, by how much."""


class NotMade(Exception):
    """A cell needs what an earlier one did not make."""


@dataclass(frozen=True)
class Sizes:
    """How large the figures are taken: in full on a GPU, else small enough to prove that everything runs."""

    models: tuple[str, ...]
    prompt: int
    response: int
    pairs_per_step: int
    steps: int
    scored_pairs: int
    sampled_prompts: int
    sampled_tokens: int


FULL = Sizes(("SmolLM2-135M", "1B", "8B"), 512, 512, 4, 5, 256, 256, 256)
REDUCED = Sizes(("tiny",), 24, 16, 2, 3, 4, 2, 8)


def sizes() -> Sizes:
    """Those of this machine."""
    return FULL if device_kind() == "cuda" else REDUCED


def write_model(model: str, where: Path) -> dict[str, Any]:
    """Write a model with random weights below `where`, from where the other cells load it."""
    begun = time.monotonic()
    unfinished = where / f"{model}.part"  # one that is stopped half-way must not be taken for the model
    write_random_model(SHAPES[model], unfinished, embedded(), device_kind())
    unfinished.rename(where / model)
    written = sum(file.stat().st_size for file in (where / model).iterdir())
    return {"GiB": f"{written / 2**30:.1f}", "seconds": f"{time.monotonic() - begun:.0f}"}


def directory_of(model: str, where: Path) -> Path:
    """The directory of a model. Raises NotMade if its weights are random and were not written."""
    if model not in SHAPES:
        return embedded()
    if not any((where / model).glob("*.safetensors")):
        raise NotMade(f"the model {model} was not written")
    return where / model


def random_trees(number: int, prompt: int, response: int) -> list[Tree]:
    """Trees of random tokens with two responses each."""
    draw = np.random.default_rng(0)
    lengths = (prompt, response, response)
    drawn = ([draw.integers(20, 49000, length).tolist() for length in lengths] for _ in range(number))
    return [Tree(trunk, (chosen, rejected)) for trunk, chosen, rejected in drawn]


def random_pairs(trees: Sequence[Tree]) -> Pairs:
    """Pairs of these trees, with made-up scores of the reference."""
    scores = [np.full(len(tree.branches[0]), -5.0, np.float32) for tree in trees]
    return Pairs([f"p{number}" for number in range(len(trees))], list(trees), scores, scores)


def config_of(directory: Path, settings: dict[str, Any]) -> Config:
    """The configuration of a training of the model at `directory` with `settings` by their full names."""
    content: dict[str, dict[str, Any]] = {"data": {"path": "pairs.jsonl"}, "reference": {}, "policy": {}, "train": {}}
    for name, value in {**settings, "policy.model": str(directory), "reference.model": str(directory)}.items():
        section, field = name.split(".")
        content[section][field] = value
    return Config.model_validate(content)


def flop_of(directory: Path, read: int, scored: int) -> float:
    """Arithmetic of a forward pass of a Llama: 2 per weight of its layers and token read, and of its head per scored token.

    Attention's own products are left out.
    """
    config = json.loads((directory / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    attention = 2 * hidden * size * (heads + config["num_key_value_heads"])
    layers = config["num_hidden_layers"] * (attention + 3 * hidden * config["intermediate_size"])
    return 2.0 * (layers * read + hidden * config["vocab_size"] * scored)
