"""vLLM in the calling process: start-up settings shared by scoring and generation."""

from __future__ import annotations

import copy
import gc
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from pipeline.hardware import device_kind, memory_gib, processors
from pipeline.models.locate import only_loaded

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig
    from vllm import LLM


# sequences that are generated or classified at once
_CONCURRENT = {"cpu": 64, "cuda": 256}


def concurrent() -> int:
    """Sequences that an engine works on at once, if memory suffices."""
    return _CONCURRENT[device_kind()]


def start_engine(directory: Path, *, kv_cache_gib: float | None, dtype: str, **options: Any) -> LLM:
    """VLLM's LLM on `directory`, in this process. `kv_cache_gib` None: on a GPU what vLLM finds free.

    Raises ConfigError if the model cannot be loaded by vLLM, or spread over as many processors.
    """
    prepare_environment(options.get("tensor_parallel_size", 1))
    # thousands of modules that live to the end: collecting among them would take seconds of the start
    gc.disable()
    from vllm import LLM

    gc.freeze()
    gc.enable()
    if device_kind() == "cpu":
        _inspect_models_here()
        # nothing is captured or compiled on a CPU
        options["enforce_eager"] = True
    if kv_cache_gib is not None:
        # by default vLLM takes most of a machine's memory, or all that a GPU has left: then fewer tokens would free nothing
        options["kv_cache_memory_bytes"] = int(kv_cache_gib * 2**30)
    try:
        return LLM(
            model=str(only_loaded(directory)),
            dtype=dtype,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            seed=0,
            **options,
        )
    except (ValueError, TypeError) as error:  # TypeError: an argument that it does not have
        raise ConfigError(f"vLLM cannot load {directory}: {' '.join(str(error).split())[:400]}") from None


def _inspect_models_here() -> None:
    """Inspect the model's class in this process instead of in a subprocess; it is about to be imported here anyway.

    vLLM does it in a process of its own so as not to start CUDA in this one; there it imports everything again
    whenever its cache does not know the class yet.
    """
    from vllm.model_executor.models import registry

    if hasattr(registry, "_run_in_subprocess"):
        registry._run_in_subprocess = lambda ask: ask()  # noqa: SLF001  # there is no setting


def speed_up_float32_output_layer(model: torch.nn.Module) -> None:
    """Keep a float32 copy of the output layer's weights, packed as vLLM packs those of other layers.

    On CPU vLLM casts the whole matrix anew in every call and multiplies without packing: two thirds of the time of scoring
    in bfloat16. The values are the same float32 products. For `LLM.apply_model`; a layer that is not a plain matrix stays
    as it is.
    """
    import torch
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    copies: dict[int, torch.nn.Module] = {}

    def in_float32(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        layer, hidden, *rest = inputs
        if not isinstance(getattr(layer, "quant_method", None), UnquantizedEmbeddingMethod):
            return None
        if id(layer) not in copies:
            packed = copy.copy(layer)
            packed._parameters = dict(layer._parameters)  # noqa: SLF001  # a shallow copy shares the dictionary
            packed.weight = torch.nn.Parameter(layer.weight.float(), requires_grad=False)
            dispatch_cpu_unquantized_gemm(packed, remove_weight=False)
            copies[id(layer)] = packed
        return copies[id(layer)], hidden.float(), *rest

    for module in model.modules():
        if isinstance(module, LogitsProcessor) and module.head_dtype == torch.float32:
            module.register_forward_pre_hook(in_float32)


@contextmanager
def running_engine(directory: Path, **options: Any) -> Iterator[LLM]:
    """`start_engine`, and `stop_engine` however the block ends."""
    engine = start_engine(directory, **options)
    try:
        yield engine
    finally:
        stop_engine(engine)


@contextmanager
def sized_engine(directory: Path, config: PretrainedConfig, dtype: str, length: int, **options: Any) -> Iterator[LLM]:
    """A `running_engine` with room for `concurrent()` sequences at once, each of up to `length` tokens, prompt and response."""
    cache = kv_cache_bytes_per_token(config, dtype) * length * concurrent() / 2**30
    settings: dict[str, Any] = {
        "max_model_len": length,
        "max_num_batched_tokens": max(4096, length),
        "max_num_seqs": concurrent(),
    }
    # on a GPU vLLM takes the memory that is free, and lets sequences wait for which there is no room
    kv_cache_gib = max(0.5, 1.1 * cache) if device_kind() == "cpu" else None
    with running_engine(directory, dtype=dtype, kv_cache_gib=kv_cache_gib, **{**settings, **options}) as engine:
        yield engine


def stop_engine(llm: LLM) -> None:
    """Give the engine's memory back, so that another can be started in this process."""
    # on a CPU nothing is left after it; collecting once more among all modules takes as long as starting a small engine
    llm.llm_engine.engine_core.shutdown()
    if device_kind() != "cpu":
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
        gc.collect()


def prepare_environment(ranks: int = 1) -> None:
    """Set what vLLM reads from the environment; must come before its first import. What the user set stays.

    On a CPU each of the `ranks` that share a model gets processors of its own. Raises ConfigError if these are too few.
    """
    cores = processors()
    if device_kind() == "cpu" and ranks > len(cores):
        raise ConfigError(f"reference.tensor_parallel_size is {ranks}, but there are {len(cores)} processors here")
    of_rank = [cores[rank * len(cores) // ranks : (rank + 1) * len(cores) // ranks] for rank in range(ranks)]
    for name, value in {
        # without it vLLM turns torch down to one thread
        "OMP_NUM_THREADS": str(len(cores) // ranks or 1),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # the processes that share a model: forked ones could not use CUDA if this process has
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, some)) for some in of_rank),
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


def kv_cache_bytes_per_token(config: PretrainedConfig, dtype: str) -> int:
    """Bytes of keys and values that one token occupies in all layers; 0 for a model without attention."""
    queries = getattr(config, "num_attention_heads", None)
    if not queries:
        return 0
    heads = getattr(config, "num_key_value_heads", None) or queries
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // queries
    return int(2 * config.num_hidden_layers * heads * head_dim * (4 if dtype == "float32" else 2))


def kv_cache_gib(config: PretrainedConfig, dtype: str, tokens: int, ranks: int = 1) -> float:
    """GiB of keys and values for `tokens` tokens on each of `ranks` devices; at least one, on a CPU at most half of the memory."""
    needed = kv_cache_bytes_per_token(config, dtype) * tokens / 2**30 / ranks
    return min(max(1.0, needed), memory_gib() / 2) if device_kind() == "cpu" else max(1.0, needed)
