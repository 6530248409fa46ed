"""`make bench-plan`: what planning costs: processor time, wall time and memory with one process and with two, and a second plan.

Rows are real preference pairs, each as often as is needed, with a number in the prompt so that no two are alike. Every figure is
of fresh processes; memory is the largest sum of the proportional shares (PSS) of all of them, looked at five times a second, and
the part of it that is no file's: pages of mapped files go first if memory is short. SHORT=1 with two numbers of ROWS tells what
memory grows by: the difference of what is no file's in "one process, again".
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from tests.conftest import ROOT, SHARED

SOURCE = SHARED / "hh_harmless_400.jsonl"
MODEL = "embedded:smollm2-135m-instruct"


def write(path: Path, number: int, *, short: bool = False) -> None:
    """Write `number` rows; `short`: of a few tokens each, so that what memory grows by is soon seen."""
    if short:
        with path.open("w", encoding="utf-8") as file:
            for at in range(number):
                file.write(json.dumps({"prompt": f"{at}", "chosen": "yes", "rejected": "no"}) + "\n")
        return
    rows = [json.loads(line) for line in SOURCE.read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for at, row in enumerate(islice(cycle(rows), number)):
            sides = {side: row[side].replace("\n\nHuman: ", f"\n\nHuman: {at}. ", 1) for side in ("chosen", "rejected")}
            file.write(json.dumps(sides) + "\n")


def plan(path: str, workers: int) -> None:
    """Plan and print the figures of this process and of those that it started."""
    from pipeline.config.files import load_overrides
    from pipeline.planning.cautions import warnings_of
    from pipeline.precompute.plan import Planning

    begun = time.monotonic()
    config = load_overrides(
        {"data": {"path": path, "workers": workers}, "reference": {"model": MODEL}, "policy": {"model": MODEL}}, []
    )
    planning = Planning(config)
    next(planning.windows())
    first = time.monotonic() - begun
    made = planning.plan()
    # as every command does that plans
    warnings_of(config, made)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(
        json.dumps(
            {
                "wall": time.monotonic() - begun,
                "cpu": sum(one.ru_utime + one.ru_stime for one in used),
                "first": first,
                "pairs": len(made.pairs),
                "sequences": made.sequences,
            }
        )
    )


def shares(pid: int) -> np.ndarray:
    """Bytes of a process and of those that it started, each page divided among those that share it: all, and those of no file [2]."""
    total = np.zeros(2, np.int64)
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines[1:]}
        total += sizes["Pss"], sizes["Pss_Anon"]
        for thread in Path(f"/proc/{pid}/task").iterdir():
            total += sum(map(shares, map(int, (thread / "children").read_text().split())))
    return total


def measure(where: Path, data: Path, workers: int, what: str) -> None:
    """Plan in a fresh process in `where`, and print a line."""
    command = [sys.executable, "-m", "tests.benchmarks.planning", "--one", str(data), "--workers", str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=where, env=environment, stdout=subprocess.PIPE, text=True) as process:
        peak = np.zeros(2, np.int64)
        while process.poll() is None:
            peak = np.maximum(peak, shares(process.pid))
            time.sleep(0.2)
        output = process.communicate()[0]
    if process.returncode:
        sys.exit(process.returncode)
    found = json.loads(output.splitlines()[-1])
    memory, of_no_file = peak / 2**30
    print(
        f"| {what} | {found['pairs']:,} | {found['cpu']:.1f} s | {found['wall']:.1f} s | {found['first']:.1f} s "
        f"| {memory:.3f} GiB | {of_no_file:.3f} GiB |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--one")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    if options.one:
        plan(options.one, options.workers)
        return
    if not (options.short or SOURCE.is_file()):
        sys.exit(f"{SOURCE} is not there: real preference pairs are not part of the project, so nothing is measured")
    print(
        "| plan | pairs | processor time | wall time | first window | memory | of no file |\n|---|--:|--:|--:|--:|--:|--:|"
    )
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as place:
        data = Path(place) / "rows.jsonl"
        write(data, options.rows, short=options.short)
        for workers, plans in ((1, ("one process", "one process, again")), (2, ("two processes",))):
            with tempfile.TemporaryDirectory(dir=place) as where:
                (Path(where) / "data").mkdir()
                (Path(where) / "data/models").symlink_to(ROOT / "data/models")
                for what in plans:
                    measure(Path(where), data, workers, what)


if __name__ == "__main__":
    main()
