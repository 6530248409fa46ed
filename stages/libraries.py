"""What libraries read from the environment when they are imported: that they are quiet, and where they keep things."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from pipeline.artifacts import durable

# what libraries are told where to keep things by: the directory, and a variable that, if the user set it, says where already
_CACHES = {
    "HF_HOME": ("huggingface", "XDG_CACHE_HOME"),
    "TORCH_HOME": ("torch", "XDG_CACHE_HOME"),
    "TORCHINDUCTOR_CACHE_DIR": ("torchinductor", ""),
    "TRITON_CACHE_DIR": ("triton", "TRITON_HOME"),
    "FLASHINFER_WORKSPACE_BASE": ("flashinfer", ""),
    "CUDA_CACHE_PATH": ("cuda", ""),
    "MPLCONFIGDIR": ("matplotlib", ""),
    "WANDB_CACHE_DIR": ("wandb/cache", "XDG_CACHE_HOME"),
    "WANDB_DATA_DIR": ("wandb/data", "XDG_DATA_HOME"),
}


def quiet() -> None:
    """No bars, no reports of use, no warnings that only their developers can do something about."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")


def keep_caches_here() -> None:
    """Let libraries keep what they fetch and compile in data/cache instead of the home directory, unless the user says where.

    vLLM's own are set where it is started. A token for the Hub, and settings of Weights & Biases, are read from where their
    tools put them.
    """
    with suppress(RuntimeError):  # there may be no home
        token = Path.home() / ".cache/huggingface/token"
        if {"HF_HOME", "XDG_CACHE_HOME"}.isdisjoint(os.environ) and token.is_file():
            os.environ.setdefault("HF_TOKEN_PATH", str(token))
        if not (Path.home() / ".config/wandb").is_dir():
            os.environ.setdefault("WANDB_CONFIG_DIR", str((durable.CACHE / "wandb/config").absolute()))
    for name, (directory, also_says_where) in _CACHES.items():
        if also_says_where not in os.environ:
            os.environ.setdefault(name, str((durable.CACHE / directory).absolute()))
