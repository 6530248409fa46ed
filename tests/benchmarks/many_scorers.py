"""Many scorers of one plan, one of them killed in the middle, with a tiny model: `make bench-many`.

For each number of sequences: three actors of Ray, driven by one process, and three processes of `refscore score-missing` on a
written plan. One of the three is killed once the first results are there. Every sequence must be in the store once; the table says
how long it took, and the peak memory of the process that drives, or plans, which must not grow with the sequences.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import psutil

from tests.benchmarks.memory import MAKE_MODEL, write
from tests.benchmarks.stages import ROOT

SCORERS = 3
_STAGES = [sys.executable, "-m", "stages.cli"]


def main() -> None:
    """Print a line for each number of sequences and way of being many."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sequences", type=int, nargs="+", default=[5_000, 50_000])
    parser.add_argument("--drive", type=Path)
    options = parser.parse_args()
    if options.drive:
        drive(options.drive)
        return
    print(f"{'sequences':>10}  {'way':<24}{'seconds':>9}{'driver, GiB':>13}{'killed':>8}{'stored once':>13}")
    peaks: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as place:
        where = Path(place)
        # elsewhere, as a process's peak begins at what its parent holds
        subprocess.run([sys.executable, "-c", MAKE_MODEL, where / "model"], check=True, cwd=ROOT, capture_output=True)
        for sequences in options.sequences:
            data = write(where / f"{sequences}.jsonl", sequences // 2)
            for way, score in (("three actors of Ray", in_ray), ("three that claim", claiming)):
                store = where / f"store-{sequences}-{score.__name__}"
                config = where / f"{sequences}-{score.__name__}.yaml"
                config.write_text(
                    f"data: {{path: {data}, max_length: 128}}\npolicy: {{model: {where}/model}}\n"
                    f"reference: {{model: {where}/model, engine: transformers, store: {store}, workers: {SCORERS}}}\n"
                )
                started = time.monotonic()
                peak, killed = score(where, config, store)
                seconds = time.monotonic() - started
                keys = pl.read_parquet(list(store.glob("*/scores-*.parquet")), columns=["key"])["key"]
                once = len(keys) == keys.n_unique() == sequences
                peaks.setdefault(way, []).append(peak)
                print(
                    f"{sequences:10,}  {way:<24}{seconds:9.0f}{peak:13.3f}{killed:8}{'yes' if once else 'NO':>13}",
                    flush=True,
                )
    for way, seen in peaks.items():
        print(f"{way}: peak memory grows by {max(seen) / seen[0] - 1:.1%} from {options.sequences[0]:,} sequences on")


def in_ray(where: Path, config: Path, store: Path) -> tuple[float, int]:
    """Score in actors, and kill one; the driver's peak in GiB, and how many were killed."""
    driver = start(where, [sys.executable, "-m", "tests.benchmarks.many_scorers", "--drive", str(config)])

    def actors() -> list[psutil.Process]:
        mine = psutil.Process(driver.pid).children(recursive=True)
        return [one for one in mine if "ScoringActor" in " ".join(one.cmdline())]

    wait_for(lambda: len(published(store)) > 1 or driver.poll() is not None)
    killed = 0
    if found := actors():
        found[0].kill()
        killed = 1
    said, _ = driver.communicate()
    assert driver.returncode == 0, said
    # Ray may say something after it
    (peak,) = [line for line in said.splitlines() if line.startswith('{"peak"')]
    return float(json.loads(peak)["peak"]), killed


def drive(config: Path) -> None:
    """Plan and score `config` with as many actors as it says, on however few processors; prints this process's peak."""
    import ray

    from pipeline.config.files import load_config
    from pipeline.engines.reference import open_reference
    from pipeline.precompute.launch import score_windows
    from pipeline.precompute.plan import Planning

    ray.init(num_cpus=SCORERS + 1, log_to_driver=False, include_dashboard=False, object_store_memory=2**27)
    settings = load_config(config)
    reference = open_reference(settings.reference)
    score_windows(reference, Planning(settings, reference).windows(), limit=settings.data.max_length)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    sys.stdout.write("\n" + json.dumps({"peak": peak}) + "\n")


def claiming(where: Path, config: Path, store: Path) -> tuple[float, int]:
    """Write the plan, score it in processes that claim its groups, and kill one; the planner's peak, and how many were killed."""
    job = where / f"job-{config.stem}"
    planner = start(
        where, [*_STAGES, "precompute", "--config", str(config), "--run", config.stem, "--plan-to", str(job)]
    )
    said = planner.stdout.read() if planner.stdout else ""
    _, status, used = os.wait4(planner.pid, 0)
    assert status == 0, said
    scorers = [start(where, [*_STAGES, "score-missing", str(job), "--config", str(config)]) for _ in range(SCORERS)]
    wait_for(lambda: len(published(store)) > 1 or all(one.poll() is not None for one in scorers))
    scorers[0].kill()
    codes = []
    for one in scorers:
        one.communicate()
        codes.append(one.returncode)
    assert codes[1:] == [0] * (SCORERS - 1), codes
    return used.ru_maxrss / 2**20, int(codes[0] == -signal.SIGKILL)


def start(where: Path, command: list[str]) -> subprocess.Popen[str]:
    """A process in `where` with one thread for products."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=where, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def published(store: Path) -> list[Path]:
    """Shards that are in the store by now."""
    return list(store.glob("*/scores-*.parquet"))


def wait_for(what: Callable[[], object]) -> None:
    """Return when `what()` holds."""
    while not what():
        time.sleep(0.1)


if __name__ == "__main__":
    main()
