"""Runs the cells, each in a fresh process, until the minutes are over; prints and writes one Markdown table per section.

Exit code 4 if a bound was missed or a cell failed. What was left out for lack of time or of a package is said, never passed over.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.hardware import circumstances, device_kind
from tests.gpu_check import correctness, speed
from tests.gpu_check.cell import FellShort, sizes

ROOT = Path(__file__).parent.parent.parent
SECTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "packed against plain": correctness.packed_against_plain,
    "engine against trainer": correctness.engine_against_trainer,
    "training": speed.training_step,
    "scoring": speed.scoring,
    "sampling": speed.sampling,
}
_IN_DIRECTORY = ("engine against trainer", "training", "scoring", "sampling")


def cells() -> list[tuple[str, tuple[str, ...]]]:
    """Section and arguments of every cell, what matters most first."""
    gpu, models = device_kind() == "cuda", sizes().models
    families = correctness.FAMILIES if gpu else correctness.WITHOUT_GPU
    found: list[tuple[str, tuple[str, ...]]] = [
        ("packed against plain", (family, dtype)) for family in families for dtype in ("float32", "bfloat16")
    ]
    found += [
        ("engine against trainer", (engine, dtype))
        for engine in ("transformers", "vllm")
        for dtype in (("float32", "bfloat16") if gpu else ("float32",))
    ]
    for model in models:
        # the weights, moments and gradients of 8B in float32 take more than any one GPU of today
        modes = ("lean", "LoRA") if model == "8B" else ("full", "lean", "LoRA")
        found += [
            ("training", (model, who, mode))
            for mode in modes
            for who in ("refscore", "trl-live", "trl-precomputed")
            if not (mode == "LoRA" and who == "trl-precomputed")
        ]
        found += [("scoring", (model, engine)) for engine in ("transformers", "vllm")]
        found.append(("sampling", (model,)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="no cell begins later, and none runs longer")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path, default=Path("data/gpu-check.md"))
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--where", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_cell(options.one[0], options.one[1:], options.where)))
        return 0
    until = time.monotonic() + 60 * options.minutes
    results: list[tuple[str, tuple[str, ...], dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as where:
        for section, arguments in cells():
            if section not in options.only:
                continue
            found = fresh(section, arguments, Path(where), until - time.monotonic())
            results.append((section, arguments, found))
            print(f"{section}: {', '.join(arguments)}: {found}", flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(page(results), encoding="utf-8")
    print(f"\n{page(results)}\n{options.out}")
    return 4 if any(found["outcome"] in ("FAILED", "FELL SHORT") for _, _, found in results) else 0


def run_cell(section: str, arguments: list[str], where: Path) -> dict[str, Any]:
    """One cell, in this process."""
    try:
        extra = (where,) if section in _IN_DIRECTORY else ()
        return {"outcome": "ok", **SECTIONS[section](*arguments, *extra)}
    except FellShort as missed:
        return {"outcome": "FELL SHORT", "why": str(missed)}
    except Exception as error:  # noqa: BLE001  # the other cells go on
        traceback.print_exc()
        return {"outcome": "FAILED", "why": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"}


def fresh(section: str, arguments: tuple[str, ...], where: Path, seconds: float) -> dict[str, Any]:
    """One cell in a process of its own, at most `seconds` long; or why it was not run."""
    missing = [name for name, wanted in (("trl", "trl-"), ("vllm", "vllm")) if wanted in " ".join(arguments)]
    missing += ["vllm"] if section == "sampling" else []
    for name in missing:
        if not any(_installed(known) for known in (name, f"{name}-cpu")):
            return {"outcome": "not run", "why": f"{name} is not installed"}
    if seconds < 5:
        return {"outcome": "not run", "why": "no time was left"}
    command = [sys.executable, "-m", "tests.gpu_check", "--where", str(where), "--one", section, *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"outcome": "not run", "why": "no time was left to end it"}
    try:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        found = {
            "outcome": "FAILED",
            "why": (done.stderr.strip().splitlines() or ["it ended without a word"])[-1][:200],
        }
    if found["outcome"] == "FAILED":
        print(done.stderr[-4000:], file=sys.stderr)
    return found


def page(results: list[tuple[str, tuple[str, ...], dict[str, Any]]]) -> str:
    """The Markdown: hardware and versions, then a table per section."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    facts = {**circumstances(), "commit": commit.stdout.strip() or "unknown", "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    for name in ("trl", "liger-kernel", "bitsandbytes"):
        facts[name] = _installed(name) or "not installed"
    kind = (
        ""
        if device_kind() == "cuda"
        else "**Reduced, on a CPU: it proves that the check runs, and nothing about a GPU.**\n\n"
    )
    lines = [f"# GPU check\n\n{kind}" + "\n".join(f"* {name}: {value}" for name, value in facts.items())]
    for section in SECTIONS:
        rows = [(arguments, found) for name, arguments, found in results if name == section]
        names = list(dict.fromkeys(name for _, found in rows for name in found))
        if rows:
            lines.append(f"## {section[0].upper()}{section[1:]}\n")
            lines.append("| " + " | ".join(["cell", *names]) + " |\n|---|" + "--:|" * len(names))
            lines += [
                "| " + " | ".join([", ".join(arguments), *(str(found.get(name, "")) for name in names)]) + " |"
                for arguments, found in rows
            ]
    return "\n".join(lines) + "\n"


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
