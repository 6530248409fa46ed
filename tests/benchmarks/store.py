"""The store at size: planning, opening a run's rows, compaction; three sizes, each step in a fresh process: `make bench-store`.

Synthetic: random keys and logps of about 200 tokens. SEQUENCES=... sets the largest store (default two million); the
plan asks for as many keys (a pair has two), half of which are stored.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts.schemas import SCORES
from pipeline.models.identity import ModelIdentity
from pipeline.store.identity import Numerics, ReferenceIdentity
from pipeline.store.store import Store
from pipeline.store.tidying.compaction import compact
from tests.benchmarks.stages import measure

REFERENCE = ReferenceIdentity(ModelIdentity({"w": "00"}, {}), Numerics("vllm", "0", "cpu", "float32", "float32"))
SHARDS = 40
TOKENS = 200


def main() -> None:
    """Build stores of three sizes and time each step on them."""
    largest = int(os.environ.get("SEQUENCES", "2000000"))
    print(f"{'stored':>10}{'asked':>10}  {'step':22}{'seconds':>9}{'peak GiB':>10}")
    for size in (largest // 4, largest // 2, largest):
        with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as where:
            subprocess.run([sys.executable, "-m", "tests.benchmarks.store", "build", where, str(size)], check=True)
            for step in ("plan", "plan again", "open 20,000 rows", "compact 8 shards"):
                seconds, peak = measure(
                    [sys.executable, "-m", "tests.benchmarks.store", step, where, str(size)], str(Path.cwd())
                )
                print(f"{size:10,}{size:10,}  {step:22}{seconds:9.1f}{peak:10.2f}", flush=True)


def build(where: Path, size: int) -> None:
    """SHARDS shards, and a file of keys of which half are stored."""
    generator = np.random.default_rng(0)
    store = Store([str(where)], REFERENCE)
    asked = []
    for start in range(0, size, per_shard(size)):
        rows = min(per_shard(size), size - start)
        keys = generator.bytes(32 * rows)
        lengths = generator.integers(TOKENS // 2, 3 * TOKENS // 2, rows, dtype=np.int32)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        values = -generator.random(int(offsets[-1]), dtype=np.float32)
        columns = [
            pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), rows, [None, pa.py_buffer(keys)]),
            pa.array(np.full(rows, 100, np.int32)),
            pa.array(lengths),
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), type=SCORES.field("logps").type),
            pa.array(np.add.reduceat(values.astype(np.float64), offsets[:-1])),
        ]
        store.publish_table(pa.table(columns, schema=SCORES))
        asked.append(keys[: 32 * (rows // 2)] + generator.bytes(32 * (rows - rows // 2)))
    joined = b"".join(asked)
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), size, [None, pa.py_buffer(joined)])
    pq.write_table(pa.table({"key": column.take(pa.array(generator.permutation(size)))}), where / "asked.parquet")


def per_shard(size: int) -> int:
    """Sequences in one shard."""
    return size // SHARDS


def run(step: str, where: Path, size: int) -> None:
    """One step, in this process; what it finds is checked."""
    if step == "build":
        build(where, size)
        return
    store = Store([str(where)], REFERENCE)
    keys = pq.read_table(where / "asked.parquet")["key"].combine_chunks()
    if step.startswith("plan"):
        assert abs(len(store.lookup(keys).missing) - size / 2) <= SHARDS + 1
    elif step.startswith("open"):
        rows = store.lookup(keys[:20_000]).found()
        assert abs(len(rows) - 10_000) < 500
    else:
        names = [shard.name for shard in store.places[0].shards()[:8]]
        assert compact(store, names) == 8 * per_shard(size)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
