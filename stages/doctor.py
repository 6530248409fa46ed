"""`refscore doctor`: what this machine has, what is missing, and the fix."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pipeline.engines.protocol import engine_version, installed_version
from pipeline.errors import CheckError, RefscoreError
from pipeline.hardware import device_kind, memory_gib, processors
from pipeline.models.directories import EMBEDDED, MODELS
from stages import console


@dataclass(frozen=True)
class Finding:
    """One line of the report; `fix` is empty if all is well, `needed` says whether a stage fails without it."""

    what: str
    seen: str
    fix: str = ""
    needed: bool = True


def main() -> None:
    """Print every finding. Raises CheckError if something a stage needs is missing."""
    findings = [check() for check in CHECKS]
    rows = [
        ["missing" if finding.fix and finding.needed else "note" if finding.fix else "ok", finding.what, finding.seen]
        for finding in findings
    ]
    for mark, what, seen in rows:
        console.say(f"{mark:8} {what:18} {seen}")
    fixes = [finding for finding in findings if finding.fix]
    for finding in fixes:
        console.say(f"\n{finding.what}: {finding.fix}")
    missing = [finding.what for finding in fixes if finding.needed]
    if missing:
        raise CheckError(f"{len(missing)} missing: {', '.join(missing)}; the fixes stand above")


def _python() -> Finding:
    seen = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", seen, "" if sys.version_info >= (3, 11) else "refscore needs Python 3.11 or newer")


def _packages() -> Finding:
    names = ("torch", "transformers", "pyarrow", "polars")
    absent = [name for name in names if find_spec(name) is None]
    seen = ", ".join(f"{name} {installed_version(name)}" for name in names if name not in absent)
    return Finding(
        "packages", seen or "none", f"not installed: {', '.join(absent)}; run 'make setup'" if absent else ""
    )


def _vllm() -> Finding:
    version = engine_version("vllm")
    if version is None:
        return Finding(
            "vllm", "not installed", "run 'make setup'; or score with reference.engine=transformers, without stage 3"
        )
    return Finding("vllm", version)


def _engine() -> Finding:
    if engine_version("vllm") is None:
        return Finding("scoring", "reference.engine=transformers only")
    if device_kind() == "cuda":
        return Finding("scoring", "reference.engine=vllm")
    return Finding(
        "scoring", "reference.engine=vllm, or transformers in less memory; 'make bench-score' times both here"
    )


def _clashing() -> Finding:
    present = [name for name in ("torchvision", "torchaudio", "torchcodec") if find_spec(name) is not None]
    fix = "builds of the general index do not fit torch's CPU build: uninstall them, or run 'make clean setup'"
    return Finding("clashing packages", ", ".join(present) or "none", fix if present and device_kind() == "cpu" else "")


def _device() -> Finding:
    if device_kind() == "cuda":
        import torch

        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        return Finding("device", ", ".join(names))
    if shutil.which("nvidia-smi"):
        fix = "an NVIDIA driver is here but torch sees no GPU: run 'REFSCORE_FLAVOUR=cuda make clean setup'"
        return Finding("device", "cpu", fix, needed=False)
    return Finding("device", f"cpu, {len(processors())} processors")


def _memory() -> Finding:
    seen = f"{memory_gib():.1f} GiB"
    return Finding("memory", seen, "" if memory_gib() >= 8 else "the demo needs about 8 GiB", needed=False)


def _disk() -> Finding:
    free = shutil.disk_usage(".").free / 2**30
    fix = "the demo needs about 8 GiB below data/" if free < 8 else ""
    return Finding("disk", f"{free:.0f} GiB free here", fix, needed=False)


def _writable() -> Finding:
    place = next(path for path in (Path("data"), Path()) if path.exists())
    fix = "" if os.access(place, os.W_OK) else f"{place.absolute()} cannot be written: work in a directory of your own"
    return Finding("data directory", str(place.absolute()), fix)


def _embedded() -> Finding:
    name, embedded = next(iter(EMBEDDED.items()))
    if (MODELS / name).is_dir():
        return Finding("embedded model", str(MODELS / name))
    if find_spec(embedded.package):
        return Finding("embedded model", "will be made on first use")
    return Finding("embedded model", "not installed", f"run 'make setup' (package {embedded.package})", needed=False)


def _hub() -> Finding:
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    token = "a token" if os.environ.get("HF_TOKEN") else "no token"
    return Finding("model hub", f"{'offline' if offline else 'asked for Hub ids'}, {token} in the environment")


def _tree() -> Finding:
    try:
        from pipeline.config.files import PRESETS, load_config

        presets = sorted(PRESETS.glob("*.yaml"))
        for preset in presets:
            # the neutral one leaves open what only its user knows
            load_config(preset, ["data.path=any"])
    except RefscoreError as error:
        return Finding("presets", "broken", str(error))
    names = ", ".join(preset.stem for preset in presets)
    return Finding("presets", names, "" if presets else "none came with this installation: install it again")


CHECKS: tuple[Callable[[], Finding], ...] = (
    _python,
    _packages,
    _vllm,
    _engine,
    _clashing,
    _device,
    _memory,
    _disk,
    _writable,
    _embedded,
    _hub,
    _tree,
)
