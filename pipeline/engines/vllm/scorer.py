"""`Scorer` on vLLM: an engine sized for the sequences, and its runner (`pipeline.engines.vllm.runners`)."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.experiment import ReferenceConfig
from pipeline.engines.protocol import Request, TopTokens
from pipeline.engines.vllm.engine import (
    kv_cache_gib,
    prepare_environment,
    speed_up_float32_output_layer,
    start_engine,
    stop_engine,
)
from pipeline.engines.vllm.runners import RowsRunner, response_rows_are_likely, runner_of, score_with, top_with
from pipeline.errors import CheckError, ConfigError
from pipeline.hardware import device_kind, note_circumstances
from pipeline.models.configuration import position_limit, text_config
from pipeline.store.identity import Numerics

log = logging.getLogger(__name__)

# logits and their log-softmax in float32, which vLLM's memory profile does not see, may take this much at a time
_LOGITS_BYTES = 2**30
# the CPU backend takes multiples of this; the smaller a block, the more of a prompt is shared
_CPU_BLOCK = 32


class VllmScorer:
    """See `pipeline.engines.protocol.Scorer`."""

    def __init__(self, reference: ReferenceConfig, directory: Path, numerics: Numerics, longest: int) -> None:
        config = text_config(directory, trusts_code=reference.trust_remote_code)
        # one more than the longest: vLLM refuses a sequence that leaves no room for the sampled token
        model_len = longest + 1
        limit = position_limit(directory)
        if limit is not None and longest > limit:
            raise ConfigError(
                f"the longest sequence has {longest} tokens, the model reads {limit}: lower data.max_length"
            )
        if model_len - 1 == limit:
            # the sampled token is never read, so no position lies beyond the limit
            os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
        vocabulary = int(config.vocab_size)

        def start(batched: int) -> None:
            self.batched_tokens = batched
            options: dict[str, Any] = {"block_size": _CPU_BLOCK} if device_kind() == "cpu" else {}
            tokens = 4 * max(model_len, batched)
            self._llm = start_engine(
                directory,
                trust_remote_code=reference.trust_remote_code,
                dtype=numerics.dtype,
                kv_cache_gib=reference.kv_cache_gib
                or kv_cache_gib(config, numerics.dtype, tokens, reference.tensor_parallel_size),
                max_model_len=model_len,
                max_num_batched_tokens=batched,
                enable_prefix_caching=reference.share_prompts,
                skip_tokenizer_init=True,
                tensor_parallel_size=reference.tensor_parallel_size,
                hf_overrides={"head_dtype": "float32"} if numerics.dtype != "float32" else {},
                **{"enforce_eager": True, **options, **reference.engine_args},
            )

        # asking vLLM imports it
        prepare_environment(reference.tensor_parallel_size)
        guessed = response_rows_are_likely()
        start(
            reference.max_batched_tokens
            or batched_tokens(vocabulary, model_len, numerics.device, response_rows=guessed)
        )
        try:
            self._set_up(reference, numerics)
            rows = isinstance(self._runner, RowsRunner)
            fewer = batched_tokens(vocabulary, model_len, numerics.device, response_rows=rows)
            if reference.max_batched_tokens is None and fewer < self.batched_tokens:
                log.info(
                    "vLLM: started again with %d tokens in a forward pass: it keeps the logits of all of them", fewer
                )
                self.close()
                start(fewer)
                self._set_up(reference, numerics)
        except BaseException:
            self.close()
            raise

    def _set_up(self, reference: ReferenceConfig, numerics: Numerics) -> None:
        _must_compute_as_named(self._llm, numerics)
        in_process = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0" and reference.tensor_parallel_size == 1
        if device_kind() == "cpu" and numerics.dtype != "float32" and in_process:
            self._llm.apply_model(speed_up_float32_output_layer)
        self._runner = runner_of(self._llm)
        # vLLM turns caching off for models whose layers cannot share a prefix
        self._shares = bool(self._llm.llm_engine.vllm_config.cache_config.enable_prefix_caching)
        note_circumstances(
            runner=str(self._runner),
            attention=str(
                getattr(self._llm.llm_engine.vllm_config.attention_config, "backend", None) or "vLLM's choice"
            ),
            tensor_parallel_size=str(reference.tensor_parallel_size),
        )
        log.debug("vLLM: %s", self._runner)
        log.info(
            "vLLM: %s",
            "a prompt is read once for all its responses" if self._shares else "every sequence is read whole",
        )

    def score(self, sequences: Sequence[Request]) -> list[np.ndarray]:
        """See `Scorer.score`."""
        return score_with(self._runner, sequences, shared=self._shares)

    def top(self, sequences: Sequence[Request], count: int) -> list[TopTokens]:
        """See `Engine.top`: every sequence is read whole, as what stands in the cache has no log-probabilities."""
        return top_with(self._llm, sequences, count)

    def close(self) -> None:
        """See `Scorer.close`."""
        stop_engine(self._llm)


def batched_tokens(vocabulary: int, model_len: int, kind: str, *, response_rows: bool) -> int:
    """Tokens in one forward pass on a device of `kind` ("cpu", "cuda"): as many as make the multiplications efficient, if the
    logits of one fit.

    `response_rows`: the V2 runner holds the logits of 1,024 rows at most, whatever a sequence's length; the V1 runner those
    of a whole sequence.
    """
    rows = max(256, _LOGITS_BYTES // (8 * vocabulary))
    if kind == "cpu":
        return min(8192, rows)
    return 16384 if response_rows or model_len <= rows else min(8192, rows)


def _must_compute_as_named(llm: Any, numerics: Numerics) -> None:
    """Raise CheckError if the engine's own dtypes are not those that the scores would be stored under."""
    model = llm.llm_engine.vllm_config.model_config
    found = {"dtype": model.dtype, "logits_dtype": model.head_dtype}
    for name, dtype in found.items():
        effective, named = str(dtype).removeprefix("torch."), getattr(numerics, name)
        if effective != named:
            raise CheckError(
                f"vLLM computes with {name} {effective}, and its scores would be stored as {named}: nothing is scored. Remove "
                "what sets it from reference.engine_args or from the model's config.json, or set reference.engine=transformers"
            )
