"""Tiny real models and data that the tests make themselves; the shared preference data where it is at hand."""

from __future__ import annotations

import gc
import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from tests.forked import run

# set before any test imports torch or vLLM, as the command line does
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# tables are read by tests: the width is fixed before the first console is made
os.environ["COLUMNS"] = "160"

# tests that run side by side share the processors out: threads of one do not wait for the other's
PROCESSORS = sorted(os.sched_getaffinity(0))
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    _workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, PROCESSORS[int(worker.removeprefix("gw")) :: _workers] or PROCESSORS)

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start engines come first: the last ones to end are short, and no worker waits long for the other."""
    slow = {item.path for item in items if item.get_closest_marker("engine")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium for all files of a worker: playwright runs once in a process."""
    from tests.view.browsing import chromium

    with chromium() as opened:
        yield opened


@pytest.fixture(autouse=True)
def _in_its_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test works below a directory of its own: `data/` is relative to where one stands."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _modules_are_not_collected_among() -> None:
    """What thousands of modules hold lives to the end: each of many collections would look through it for half a second."""
    if len(sys.modules) > _left_out[0] + 200:
        _left_out[0] = len(sys.modules)
        gc.collect()
        gc.freeze()


_left_out = [0]


def pytest_unconfigure() -> None:
    """What Python ends with is collected again: libraries complain of what is not."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _nothing_is_left_for_the_next() -> Iterator[None]:
    """What a test says to the environment, or how it made this process speak, is taken back."""
    before, limit = dict(os.environ), sys.getrecursionlimit()
    yield
    os.environ.clear()
    os.environ.update(before)
    sys.setrecursionlimit(limit)
    if console := sys.modules.get("stages.console"):
        console.speak()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def all_processors() -> Iterator[None]:
    """For tests of several engines: every processor of the machine, also beside another worker of pytest's."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, PROCESSORS)
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with random weights and a byte-level tokenizer trained on a few sentences."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def make_tiny_model(directory: Path, seed: int = 0, **config: object) -> Path:
    """Save a tiny Llama and its tokenizer in Hugging Face layout."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tiny_tokenizer()
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
        **config,
    }
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_tiny_tokenizer():
    """A byte-level BPE with a chat template, three special tokens and about 300 entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog ran", "how do I cook rice well today"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def preference_rows(number: int) -> list[dict]:
    """Small rows whose responses differ in length and words."""
    return [
        {
            "prompt": f"How do I cook rice number {at}?",
            "chosen": f"Rinse it, then boil it for {10 + at % 7} minutes." + " Stir well." * (at % 3),
            "rejected": f"The cat sat on mat {at}." + " The dog ran and ran" * (1 + at % 4),
        }
        for at in range(number)
    ]


@pytest.fixture
def preferences(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "preferences.jsonl", preference_rows(24))


@pytest.fixture
def shared_data() -> Path:
    """Real preference pairs that lie beside a developer's checkout."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared/data beside this checkout: real preference data is not part of the project")
    return SHARED


def experiment(tmp_path: Path, model: Path, data: Path, **sections: dict) -> Path:
    """A configuration file for the tiny model."""
    import yaml

    content: dict = {
        "data": {"path": str(data), "eval_fraction": 0.25, "max_length": 256},
        "reference": {"model": str(model), "engine": "transformers"},
        "policy": {"model": str(model)},
        "train": {"learning_rate": 1e-3, "per_device_train_batch_size": 2, "max_steps": 4, "precision": "float32"},
        "generate": {"max_tokens": 16},
    }
    for name, values in sections.items():
        if isinstance(values, dict):
            content.setdefault(name, {}).update(values)
        else:
            content[name] = values
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def refscore(where: Path, *arguments: object, code: int = 0, **environment: str) -> str:
    """Run the command line in `where`; returns stdout and stderr together. The exit code must be `code`."""
    done = subprocess.run(
        [sys.executable, "-m", "stages.cli", *map(str, arguments)],
        cwd=where,
        env={**os.environ, "COLUMNS": "160", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout


def refscore_here(where: Path, *arguments: object, code: int = 0) -> str:
    """Like `refscore`, in this process: for many short commands that need no process of their own."""
    from stages.cli import main

    logger, environment, before = logging.getLogger(), dict(os.environ), Path.cwd()
    handlers = list(logger.handlers)
    output = io.StringIO()
    os.chdir(where)
    os.environ["COLUMNS"] = "160"
    try:
        with redirect_stdout(output), redirect_stderr(output), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["refscore", *map(str, arguments)])
            with pytest.raises(SystemExit) as stop:
                main()
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(environment)
        logger.handlers[:] = handlers
    assert (stop.value.code or 0) == code, output.getvalue()
    return output.getvalue()


IN_TURN = """
import json, os, sys
os.dup2(1, 2)
sys.stderr = sys.stdout
from stages.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["refscore", *arguments]
    try:
        main()
    except SystemExit as stop:
        print(f"ENDED {stop.code or 0}", flush=True)
"""


def refscore_in_turn(where: Path, *commands: tuple[object, ...]) -> list[tuple[int, str]]:
    """Commands in one process beside this one, for those that start vLLM, whose imports take most of their time.

    Returns every command's exit code, and stdout and stderr together.
    """
    arguments = json.dumps([[*map(str, command)] for command in commands])
    done = run(where, IN_TURN, arguments)
    assert "Traceback" not in done.stdout, done.stdout
    said = re.split(r"^ENDED (\d+)\n", done.stdout, flags=re.MULTILINE)
    assert len(said) == 2 * len(commands) + 1, done.stdout
    return [(int(code), text) for text, code in zip(said[:-1:2], said[1::2], strict=True)]


def run_stages(where: Path, config: Path, run: str, *stages: str) -> dict[str, str]:
    """Run stages as of a user with an empty home and place for temporary files, `home` and `temporary`; what each said."""
    for place in ("home", "temporary"):
        (where / place).mkdir()
    here = {"PATH": os.environ["PATH"], "HOME": where / "home", "TMPDIR": where / "temporary", "PYTHONPATH": ROOT}
    said = {}
    for stage in stages:
        done = subprocess.run(
            [sys.executable, "-m", "stages.cli", stage, "--config", config, "--run", run],
            cwd=where, env={**here, "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        assert "Traceback" not in done.stdout
        said[stage] = done.stdout
    return said


def must_leave_nothing_outside(where: Path, said: dict[str, str]) -> None:
    """Of `run_stages`: no file in the home or among temporary ones, no warning of a library, which a user could do nothing about."""
    assert list((where / "home").rglob("*")) == []
    assert list((where / "temporary").rglob("*")) == []
    assert not [stage for stage, text in said.items() if "WARNING" in text]


@pytest.fixture(scope="session")
def pipeline_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, dict[str, str]]:
    """A directory in which all three stages have run once on the tiny model with real vLLM, and what they printed."""
    where = tmp_path_factory.mktemp("pipeline")
    data = write_rows(
        where / "preferences.jsonl", [*preference_rows(24), {"prompt": "Hi?", "chosen": "", "rejected": "x"}]
    )
    config = experiment(where, tiny_model, data, reference={"engine": "vllm"})
    return where, run_stages(where, config, "first", "precompute", "train", "eval")
