"""Runs the cells, each in a fresh process, until the minutes are over; prints and writes one page of Markdown.

Exit code 4 if a bound was missed, a cell failed, or nothing was run. What was left out, for lack of time, of a package or of
memory, is said. A cell that is stopped takes all of its processes with it: an engine left behind would keep the GPU's memory.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts.markdown import markdown_table
from pipeline.engines.single import ran_out_of_memory
from pipeline.errors import first_line
from pipeline.hardware import circumstances, device_kind
from tests.gpu_check import correctness, speed
from tests.gpu_check.cell import SHAPES, FellShort, NotMade, sizes, write_model

ROOT = Path(__file__).parent.parent.parent
Cell = tuple[str, tuple[str, ...]]
Result = dict[str, Any]
SECTIONS: dict[str, Callable[..., Result]] = {
    "random models": write_model,
    "packed against plain": correctness.packed_against_plain,
    "engine against trainer": correctness.engine_against_trainer,
    "training": speed.training_step,
    "scoring": speed.scoring,
    "sampling": speed.sampling,
}
# a cell that hangs must not take the time of all others
CELL_SECONDS = 360
FAILURES = ("FAILED", "FELL SHORT")
# GiB of full training by `make bench-memory-train`; a GPU with less is not asked
FULL_GIB = {"8B": 119.8}


def cells(only: Sequence[str]) -> list[Cell]:
    """Section and arguments of every cell of the sections `only`, what matters most first."""
    gpu, models = device_kind() == "cuda", sizes().models
    by_model: list[list[Cell]] = []
    families = correctness.FAMILIES if gpu else correctness.WITHOUT_GPU
    found: list[Cell] = [
        ("packed against plain", (family, arithmetic)) for family in families for arithmetic in ("float32", "bfloat16")
    ]
    if gpu:
        found += [("packed against plain", (family, "bfloat16 compiled")) for family in list(families)[:2]]
    for number, model in enumerate(models):
        of_model: list[Cell] = [("random models", (model,))] if model in SHAPES else []
        if number == 0:
            found += of_model
            found += [
                ("engine against trainer", (engine, dtype))
                for engine in ("transformers", "vllm")
                for dtype in ("float32", "bfloat16")
            ]
            of_model = []
        of_model += [("scoring", (model, engine)) for engine in ("vllm", "transformers")]
        of_model.append(("sampling", (model,)))
        modes = [mode for mode in ("lean", "LoRA", "full") if mode != "full" or _full_fits(model)]
        of_model += [
            ("training", (model, who, mode)) for mode in modes for who in ("refscore", "trl-live", "trl-precomputed")
        ]
        by_model.append(of_model)
    # the largest first: it says most about what users have, and the minutes may not do for all
    found += [cell for of_model in reversed(by_model) for cell in of_model]
    models_needed = any(section in only for section in list(SECTIONS)[2:])
    return [
        (section, arguments)
        for section, arguments in found
        if section in only or (section == "random models" and models_needed)
    ]


def _full_fits(model: str) -> bool:
    """Whether float32 weights, gradients and optimizer states of a model can fit this GPU."""
    return device_kind() != "cuda" or torch.cuda.mem_get_info()[1] / 2**30 > FULL_GIB.get(model, 0.0)


def main() -> int:
    """Run the cells and write the page; with --one, be a cell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="no cell begins later, and none runs on after them")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS)[1:], default=list(SECTIONS)[1:])
    parser.add_argument("--out", type=Path, default=Path("data/gpu-check.md"))
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--where", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        (options.where / "result.json").write_text(json.dumps(run_cell(options.one[0], options.one[1:], options.where)))
        return 0
    until = time.monotonic() + 60 * options.minutes
    results: list[tuple[Cell, Result]] = []
    scratch = ROOT / "data" / "cache"
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        for left in scratch.glob("gpu-check-*"):  # by one that was killed
            shutil.rmtree(left, ignore_errors=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page(results), encoding="utf-8")
    except OSError as error:
        parser.error(f"nothing can be written to {error.filename}: {error.strerror}")
    with tempfile.TemporaryDirectory(dir=scratch, prefix="gpu-check-") as where:
        for cell in cells(options.only):
            found = fresh(cell, Path(where), until - time.monotonic())
            results.append((cell, found))
            print(f"{cell[0]}: {', '.join(cell[1])}: {', '.join(map(str, found.values()))}", flush=True)
            options.out.write_text(page(results), encoding="utf-8")
    counts = Counter(found["outcome"] for _, found in results)
    print(f"{', '.join(f'{number} {outcome}' for outcome, number in counts.items())}; the page is {options.out}")
    return 4 if not counts["ok"] or any(counts[outcome] for outcome in FAILURES) else 0


def run_cell(section: str, arguments: Sequence[str], where: Path) -> Result:
    """One cell, in this process."""
    extra = () if section == "packed against plain" else (where,)
    try:
        return {"outcome": "ok", **SECTIONS[section](*arguments, *extra)}
    except FellShort as missed:
        return {"outcome": "FELL SHORT", "why": str(missed)}
    except NotMade as lacking:
        return {"outcome": "not run", "why": str(lacking)}
    except Exception as error:  # noqa: BLE001  # the other cells go on
        traceback.print_exc()
        if section == "training" and ran_out_of_memory(error):
            return {"outcome": "out of memory"}
        return {"outcome": "FAILED", "why": f"{type(error).__name__}: {first_line(error)}"}


def fresh(cell: Cell, where: Path, seconds: float) -> Result:
    """One cell in processes of its own, at most `seconds` long; or why it was not run."""
    section, arguments = cell
    if missing := [name for name in needed_by(cell) if not (_installed(name) or _installed(f"{name}-cpu"))]:
        return {"outcome": "not run", "why": f"{' and '.join(missing)} not installed"}
    if seconds < 1:
        return {"outcome": "not run", "why": "no time was left"}
    result, log = where / "result.json", where / "log.txt"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.gpu_check", "--where", str(where), "--one", section, *arguments]
    with log.open("w") as output:
        child = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
        try:
            child.wait(min(seconds, CELL_SECONDS))
        except subprocess.TimeoutExpired:
            limit = "the time that was left" if seconds < CELL_SECONDS else f"{CELL_SECONDS} s"
            return {
                "outcome": "not run" if seconds < CELL_SECONDS else "FAILED",
                "why": f"it did not end within {limit}",
            }
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    said = log.read_text(errors="replace")
    found: Result
    if result.is_file():
        found = json.loads(result.read_text())
    else:
        found = {"outcome": "FAILED", "why": (said.strip().splitlines() or ["it ended without a word"])[-1][:200]}
    if found["outcome"] == "FAILED":
        print(said[-4000:], file=sys.stderr)
    return found


def needed_by(cell: Cell) -> list[str]:
    """Packages that a cell needs beside refscore's own."""
    section, arguments = cell
    words = {
        "vllm": section == "sampling" or "vllm" in arguments,
        "trl": any(argument.startswith("trl-") for argument in arguments),
        "bitsandbytes": "lean" in arguments,
    }
    return [name for name, needed in words.items() if needed]


def page(results: Sequence[tuple[Cell, Result]]) -> str:
    """The Markdown: hardware and versions, then a table per section."""
    facts = {**circumstances(), "commit": _commit(), "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    for name in ("trl", "liger-kernel", "bitsandbytes"):
        facts[name] = _installed(name) or "not installed"
    parts = ["# GPU check"]
    if device_kind() != "cuda":
        parts.append("**Reduced, on a CPU: it shows that the check runs, and nothing about a GPU.**")
    parts.append("\n".join(f"* {name}: {value}" for name, value in facts.items()))
    for section in SECTIONS:
        rows = [(arguments, found) for (name, arguments), found in results if name == section]
        names = list(dict.fromkeys(name for _, found in rows for name in found))
        if rows:
            table = [[", ".join(arguments), *(found.get(name, "") for name in names)] for arguments, found in rows]
            parts += [f"## {section[0].upper()}{section[1:]}", markdown_table(["cell", *names], table)]
    return "\n\n".join(parts) + "\n"


def _commit() -> str:
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


def _installed(name: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cell is stopped and its models are deleted
    sys.exit(main())
