"""Sampling responses with vLLM: from any model directory, for prompts given as token ids.

Every request has its own seed, a digest of the configured seed, the prompt and the sample's number, so a response does
not depend on the order of the batch. vLLM's CPU runner fails on a seeded request whose prompt is read in pieces, so
prompts are never cut into pieces here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import GenerateConfig
from pipeline.errors import ConfigError
from pipeline.models import ModelSpec, load_tokenizer
from pipeline.pairs import end_of_turn_id, prompt_id_of
from pipeline.vllm_engine import kv_cache_bytes_per_token, prepare_environment, read_config, start_engine, stop_engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONCURRENT = 64


@dataclass(frozen=True)
class Sample:
    """One response: `ids` end with the end-of-turn token if `finish_reason` is "stop"; "length" means cut off."""

    text: str
    ids: list[int]
    finish_reason: str


def _no_report(responses: int, tokens: int) -> None:  # progress that nobody wants to see
    pass


def generate(
    directory: Path,
    spec: ModelSpec,
    prompts: Sequence[Sequence[int]],
    settings: GenerateConfig,
    on_done: Callable[[int, int], None] = _no_report,
) -> list[list[Sample]]:
    """`settings.samples` responses for every prompt, in order; `on_done(responses, tokens)` as waves finish.

    Raises ConfigError where prompt and response together are longer than the model reads.
    """
    prepare_environment()
    from vllm import SamplingParams, TokensPrompt

    tokenizer = load_tokenizer(directory, spec)
    stops = stop_ids(directory, tokenizer)
    config = read_config(directory)
    model_len = max(map(len, prompts)) + settings.max_tokens + 1
    limit = config.get("max_position_embeddings")
    if isinstance(limit, int) and model_len > limit:
        raise ConfigError(
            f"the longest prompt has {max(map(len, prompts))} tokens; with generate.max_tokens={settings.max_tokens} that is "
            f"more than the {limit} the model reads: lower generate.max_tokens"
        )
    dtype = "bfloat16" if settings.dtype == "auto" else settings.dtype
    cache = kv_cache_bytes_per_token(config, dtype) * model_len * _CONCURRENT / 2**30
    engine = start_engine(
        directory,
        trust_remote_code=spec.trust_remote_code,
        dtype=dtype,
        kv_cache_gib=max(0.5, 1.1 * cache),
        max_model_len=model_len,
        max_num_batched_tokens=max(4096, model_len),
        max_num_seqs=_CONCURRENT,
        enable_chunked_prefill=False,
        skip_tokenizer_init=True,
    )
    requests = [(prompt, number) for prompt in prompts for number in range(settings.samples)]
    found: list[Sample] = []
    # several waves at a time keep the batch full and still show progress
    for start in range(0, len(requests), 4 * _CONCURRENT):
        wave = requests[start : start + 4 * _CONCURRENT]
        params = [
            SamplingParams(
                max_tokens=settings.max_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=_request_seed(settings.seed, prompt, number),
                stop_token_ids=stops,
                detokenize=False,
            )
            for prompt, number in wave
        ]
        inputs = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt, _ in wave]
        outputs = engine.generate(inputs, params, use_tqdm=False)
        for output in outputs:
            one = output.outputs[0]
            ids = list(one.token_ids)
            text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
            found.append(Sample(text, ids, str(one.finish_reason)))
        on_done(len(wave), sum(len(sample.ids) for sample in found[start:]))
    stop_engine(engine)
    return [found[at : at + settings.samples] for at in range(0, len(found), settings.samples)]


def stop_ids(directory: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a response: the template's end of turn, and what generation_config.json names."""
    ids = {end_of_turn_id(tokenizer)}
    path = directory / "generation_config.json"
    if path.is_file():
        named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        ids |= set(named) if isinstance(named, list) else {named} if isinstance(named, int) else set()
    return sorted(ids)


def _request_seed(seed: int, prompt: Sequence[int], number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{prompt_id_of(prompt)}/{number}".encode()).digest()[:4], "big")
