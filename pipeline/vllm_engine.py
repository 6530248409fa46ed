"""vLLM in the calling process: start-up settings shared by scoring and generation, and the scorer.

Scoring asks for the log-probability of every prompt token of [prompt | response] and keeps the response's part. One token
must be sampled with every request (vLLM refuses zero); it is thrown away.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config import ReferenceConfig
from pipeline.errors import CheckError, ConfigError
from pipeline.hardware import device_kind, memory_gib, processors
from pipeline.identity import Numerics
from pipeline.scoring import Request

if TYPE_CHECKING:
    from vllm import LLM

log = logging.getLogger(__name__)

# a forward pass without a profile for its logits may hold this much of them (float32 logits and their log-softmax)
_LOGITS_BYTES = 2**30


class VllmScorer:
    """`Scorer` on vLLM; see `pipeline.scoring.Scorer`."""

    def __init__(self, reference: ReferenceConfig, directory: Path, numerics: Numerics, longest: int) -> None:
        config = read_config(directory)
        # one more than the longest: vLLM refuses a sequence that leaves no room for the sampled token
        model_len = longest + 1
        limit = config.get("max_position_embeddings")
        if isinstance(limit, int) and model_len > limit:
            raise ConfigError(
                f"the longest sequence has {longest} tokens, the model reads {limit - 1} with vLLM: lower data.max_length"
            )
        batched = reference.max_batched_tokens or max(256, min(8192, _LOGITS_BYTES // (8 * int(config["vocab_size"]))))
        overrides = {"head_dtype": "float32"} if numerics.dtype != "float32" else {}
        self._llm = start_engine(
            directory,
            trust_remote_code=reference.trust_remote_code,
            dtype=numerics.dtype,
            kv_cache_gib=reference.kv_cache_gib or _kv_cache_gib(config, numerics.dtype, 4 * max(model_len, batched)),
            max_model_len=model_len,
            max_num_batched_tokens=batched,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            hf_overrides=overrides,
        )

    def score(self, sequences: Sequence[Request]) -> list[np.ndarray]:
        """See `Scorer.score`."""
        from vllm import SamplingParams, TokensPrompt

        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, prompt_logprobs=0, flat_logprobs=True)
        prompts = [TokensPrompt(prompt_token_ids=[*item.prompt_ids, *item.response_ids]) for item in sequences]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        if len(outputs) != len(sequences):
            raise CheckError(f"vLLM answered {len(outputs)} of {len(sequences)} requests")
        return [_response_logps(item, output) for item, output in zip(sequences, outputs, strict=True)]


def start_engine(directory: Path, *, kv_cache_gib: float, dtype: str, **options: Any) -> LLM:
    """VLLM's LLM on `directory`, eager, in this process.

    Raises ConfigError where the model cannot be loaded by vLLM.
    """
    prepare_environment()
    from vllm import LLM

    if device_kind() == "cpu":
        # the CPU backend's default takes most of the machine's memory; on a GPU vLLM measures what is free
        options["kv_cache_memory_bytes"] = int(kv_cache_gib * 2**30)
    try:
        return LLM(
            model=str(directory),
            dtype=dtype,
            enforce_eager=True,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            seed=0,
            **options,
        )
    except ValueError as error:
        raise ConfigError(f"vLLM cannot load {directory}: {' '.join(str(error).split())[:400]}") from None


def stop_engine(llm: LLM) -> None:
    """Give the engine's memory back, so that another can be started in this process."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    gc.collect()


def prepare_environment() -> None:
    """Set what vLLM reads from the environment; must come before its first import. What the user set stays."""
    cores = processors()
    for name, value in {
        # without it vLLM turns torch down to one thread
        "OMP_NUM_THREADS": str(len(cores)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(Path("data/cache/vllm").absolute()),
        "VLLM_CONFIG_ROOT": str(Path("data/cache/vllm").absolute()),
    }.items():
        os.environ.setdefault(name, value)
    # loggers below "vllm" take its level only after vLLM has set itself up; this one speaks before
    for name in ("vllm", "vllm.triton_utils.importing"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*torch.distributed.reduce_op.*", category=FutureWarning)


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model; of the text part where the model has several."""
    content: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    nested = content.get("text_config")
    return nested if isinstance(nested, dict) else content


def kv_cache_bytes_per_token(config: dict[str, Any], dtype: str) -> int:
    """Bytes of keys and values that one token occupies in all layers."""
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(2 * config["num_hidden_layers"] * heads * head_dim * (4 if dtype == "float32" else 2))


def _kv_cache_gib(config: dict[str, Any], dtype: str, tokens: int) -> float:
    needed = kv_cache_bytes_per_token(config, dtype) * tokens / 2**30
    return min(max(1.0, needed), memory_gib() / 2)


def _response_logps(item: Request, output: Any) -> np.ndarray:
    # one entry per position from 1 on (position 0 has no predecessor); entry 0 of each is the token itself
    flat, start = output.prompt_logprobs, len(item.prompt_ids)
    if len(flat) != len(item):
        raise CheckError(f"vLLM returned {len(flat)} positions for a sequence of {len(item)}")
    asked = list(item.response_ids)
    begin, end = flat.start_indices[start], flat.end_indices[-1]
    if end - begin != len(asked) or list(flat.token_ids[begin:end]) != asked:
        raise CheckError("vLLM returned log-probabilities of other token ids than were asked")
    return np.asarray(flat.logprobs[begin:end], dtype=np.float32)
