"""The store's commands at size, each in a fresh process: ls, verify, gc, compact by one process and by two: `make bench-tidy`.

Synthetic: random keys, logps of about 100 tokens. SEQUENCES=... sets the size (default two million), in shards of 2,000.
"""

from __future__ import annotations

import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.benchmarks.stages import ROOT, measure

ROWS, TOKENS = 2_000, 100
BUILD = "import sys; from pathlib import Path; from tests.benchmarks.store import build; build(Path(sys.argv[1]), *map(int, sys.argv[2:]))"


def main() -> None:
    """Make a store, and time each command on it; the second compaction finds the store as the first one did."""
    size = int(os.environ.get("SEQUENCES", "2000000"))
    os.environ["PYTHONPATH"] = str(ROOT)
    print(f"{'stored':>12}  {'command':28}{'seconds':>9}{'peak GiB':>10}")
    for processes in (1, 2):
        with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as where:
            measure([sys.executable, "-c", BUILD, where, str(size), str(ROWS), str(TOKENS)], where)
            for command in ("ls", "verify", "gc") if processes == 1 else ():
                show(size, command, *measure(cli(command, where), where))
            with ThreadPoolExecutor(processes) as pool:
                done = list(pool.map(lambda _: measure(cli("compact", where), where), range(processes)))
            shards = len(list((Path(where) / "store").glob("*/scores-*.parquet")))
            assert shards < size // ROWS
            for seconds, peak in done:
                show(size, f"compact by {processes}, {shards} left", seconds, peak)
            show(size, "verify, compacted", *measure(cli("verify", where), where))


def cli(command: str, where: str) -> list[str]:
    """The command as it is typed."""
    return [sys.executable, "-m", "stages.cli", "store", command, "--store", f"{where}/store"]


def show(size: int, command: str, seconds: float, peak: float) -> None:
    """A row."""
    print(f"{size:12,}  {command:28}{seconds:9.1f}{peak:10.2f}", flush=True)


if __name__ == "__main__":
    main()
