"""Sampling responses with vLLM: from a model directory or from an adapter on one, for prompts given as token ids.

Every request has its own seed, a digest of the configured seed, the prompt and the sample's number, so a response does
not depend on the order of the batch. vLLM's CPU runner fails on a seeded request whose prompt is read in pieces, so
prompts are never cut into pieces here. An adapter is applied by the engine; nothing is merged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.experiment import GenerateConfig
from pipeline.engines.vllm.engine import concurrent, prepare_environment, sized_engine
from pipeline.errors import ConfigError
from pipeline.models.configuration import position_limit, text_config
from pipeline.models.load import ModelSpec, load_tokenizer
from pipeline.pairs.encoding import end_of_turn_id
from pipeline.pairs.splits import prompt_id_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Sample:
    """One response: `ids` end with the end-of-turn token if `finish_reason` is "stop"; "length" means cut off."""

    text: str
    ids: list[int]
    finish_reason: str


OnDone = Callable[[int, int], None]
Generate = Callable[[Sequence[Sequence[int]], GenerateConfig, OnDone], list[list[Sample]]]


def settled(settings: GenerateConfig, dtype: str) -> GenerateConfig:
    """`settings` with `dtype: auto` made `dtype`, in which the reference is scored.

    Weights trained in float32 are another model once rounded to bfloat16: the updates of a short training are smaller
    than the rounding, and responses sampled so are not the policy's whose logps are compared.
    """
    return settings.model_copy(update={"dtype": dtype}) if settings.dtype == "auto" else settings


@contextmanager
def generator(
    directory: Path, spec: ModelSpec, longest: int, settings: GenerateConfig, adapter: Path | None = None
) -> Iterator[Generate]:
    """A started engine as a function: prompts and settings to `settings.samples` responses for every prompt, in order.

    `longest` is the longest prompt in tokens; `settings.max_tokens` and `dtype` (settled) hold for every call. `on_done(responses,
    tokens)` is called as waves finish. Raises ConfigError if prompt and response are longer than the model reads.
    """
    prepare_environment()
    from vllm import SamplingParams, TokensPrompt

    tokenizer = load_tokenizer(directory, spec)
    stops = stop_ids(directory, tokenizer)
    config = text_config(directory, trusts_code=spec.trust_remote_code)
    model_len = longest + settings.max_tokens + 1
    limit = position_limit(directory)
    if limit is not None and model_len > limit:
        raise ConfigError(
            f"the longest prompt has {longest} tokens; with generate.max_tokens={settings.max_tokens} that is "
            f"more than the {limit} the model reads: lower generate.max_tokens"
        )
    if settings.dtype == "auto":
        raise ValueError("dtype is not settled")
    with sized_engine(
        directory,
        config,
        settings.dtype,
        model_len,
        trust_remote_code=spec.trust_remote_code,
        enable_chunked_prefill=False,
        skip_tokenizer_init=True,
        **{**_lora_options(adapter), **settings.engine_args},
    ) as engine:
        lora = _lora_request(adapter)

        def generate(prompts: Sequence[Sequence[int]], settings: GenerateConfig, on_done: OnDone) -> list[list[Sample]]:
            requests = [(prompt, number) for prompt in prompts for number in range(settings.samples)]
            samples: list[Sample] = []
            # several times what runs at once keeps the batch full and still shows progress
            size = 4 * int(settings.engine_args.get("max_num_seqs", concurrent()))
            for start in range(0, len(requests), size):
                wave = requests[start : start + size]
                params = [
                    SamplingParams(
                        max_tokens=settings.max_tokens,
                        temperature=settings.temperature,
                        top_p=settings.top_p,
                        seed=request_seed(settings.seed, prompt, number),
                        stop_token_ids=stops,
                        # vLLM gives the ending tokens no probability below so many
                        min_tokens=settings.max_tokens if settings.fixed_length else 0,
                        detokenize=False,
                    )
                    for prompt, number in wave
                ]
                inputs = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt, _ in wave]
                for output in engine.generate(inputs, params, use_tqdm=False, lora_request=lora):
                    completion = output.outputs[0]
                    ids = list(completion.token_ids)
                    # what it begins with belongs to it: in plain text a word goes on after a space
                    text = str(tokenizer.decode(ids, skip_special_tokens=True)).rstrip()
                    samples.append(Sample(text, ids, str(completion.finish_reason)))
                on_done(len(wave), sum(len(sample.ids) for sample in samples[start:]))
            return [samples[start : start + settings.samples] for start in range(0, len(samples), settings.samples)]

        yield generate


def stop_ids(directory: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a response: the template's end of turn, and what generation_config.json names."""
    ids = {end_of_turn_id(tokenizer)}
    path = directory / "generation_config.json"
    if path.is_file():
        named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        ids |= set(named) if isinstance(named, list) else {named} if isinstance(named, int) else set()
    return sorted(ids)


def request_seed(seed: int, prompt: Sequence[int], number: int) -> int:
    """The seed of a prompt's `number`-th response: 32 bits of a digest of all three."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{prompt_id_of(prompt)}/{number}".encode()).digest()[:4], "big")


def _lora_options(adapter: Path | None) -> dict[str, Any]:
    if adapter is None:
        return {}
    content = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    # a layer may have a rank of its own
    rank = max([int(content["r"]), *map(int, (content.get("rank_pattern") or {}).values())])
    fitting = [known for known in _LORA_RANKS if known >= rank]
    if not fitting:
        raise ConfigError(f"{adapter} has rank {rank}; vLLM serves adapters up to {_LORA_RANKS[-1]}: merge it first")
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": fitting[0]}


def _lora_request(adapter: Path | None) -> Any:
    if adapter is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest("adapter", 1, str(adapter.absolute()))
