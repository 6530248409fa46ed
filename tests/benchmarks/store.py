"""The store at size, each step in a fresh process: `make bench-store`.

Synthetic: random keys, shards of ROWS sequences with few logps. SEQUENCES=2000000,10000000,50000000 says which stores are made, one
after the other; 50 million take 4 GB and their index 2, or 4 while it is merged. Who publishes adds to the index; the first plan of
a store without one makes it. Half of the keys that a plan asks for are stored. BENCH_DIR=... is where.

Then PAIRS=1000000 pairs are joined with scores of about 200 tokens that lie in another order, in 40 shards; and SHARDS=5000 shards
lie at an S3 server of this machine, whose requests are counted.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts.schemas import PAIRS, SCORES
from pipeline.models.identity import ModelIdentity
from pipeline.precompute.join import write_joined
from pipeline.store.identity import Numerics, ReferenceIdentity
from pipeline.store.index.merging import FOLDER as INDEX
from pipeline.store.shard import shard_files
from pipeline.store.store import Store
from tests.benchmarks.stages import ROOT, measure

REFERENCE = ReferenceIdentity(ModelIdentity({"w": "00"}, {}), Numerics("vllm", "0", "cpu", "float32", "float32"))
ROWS = 50_000
ASKED = (20_000, 2_000_000)
GROUP, MANY = 2048, 40
FIRST = "first plan"


def main() -> None:
    """Make each store and time each step on it."""
    sizes = [int(size) for size in os.environ.get("SEQUENCES", "2000000").split(",")]
    pairs, shards = int(os.environ.get("PAIRS", "1000000")), int(os.environ.get("SHARDS", "5000"))
    print(f"{'stored':>12}  {'step':34}{'seconds':>9}{'peak GiB':>10}{'requests':>10}")
    for size in sizes:
        with _place() as where:
            _child("build", where, size, ROWS, 8)
            for step in (FIRST, *(f"plan {asked}" for asked in ASKED), f"open {ASKED[0]}"):
                _print(size, step, *_child(step, where, size))
            shutil.rmtree(where / "store" / REFERENCE.reference_id / INDEX)
            _print(size, f"{FIRST}, no index", *_child(FIRST, where, size))
    if pairs:
        with _place() as where:
            _child("build", where, 2 * pairs, 2 * pairs // MANY, 200)
            _print(2 * pairs, f"join of {pairs:,} pairs", *_child("join", where, 2 * pairs))
    if shards:
        with _place() as where, _server(where) as (url, requests):
            _child("build", where, 20 * shards, 20, 8)
            for index in (True, False):
                if not index:
                    shutil.rmtree(where / "store" / REFERENCE.reference_id / INDEX)
                place = f"{url}/{'with' if index else 'without'}"
                _child("upload", where, 20 * shards, place)
                print(f"{shards:,} objects at S3, published {'by refscore' if index else 'without an index'}:")
                for step in (FIRST, f"plan {ASKED[0]}", f"open {ASKED[0]}"):
                    shutil.rmtree(where / "data", ignore_errors=True)
                    before = requests()
                    seconds, peak = _child(step, where, 20 * shards, place)
                    _print(20 * shards, step, seconds, peak, requests() - before)


def run(step: str, where: Path, size: int, *options: str) -> None:
    """One step, in this process; what it finds is checked."""
    if step == "build":
        build(where, size, int(options[0]), int(options[1]))
    elif step == "upload":
        _upload(where, options[0])
    elif step == "join":
        join(where, size)
    else:
        store = Store([options[0] if options else str(where / "store")], REFERENCE)
        asked = ASKED[0] if step == FIRST else int(step.split()[1])
        keys = pq.read_table(where / f"asked-{asked}.parquet")["key"].combine_chunks()
        lookup = store.lookup(keys)
        assert len(lookup.held) + len(lookup.missing) == len(keys)
        assert len(lookup.held) == _stored(where, keys)
        if step.startswith("open"):
            assert len(lookup.found()) == len(lookup.held)


def build(where: Path, size: int, rows: int, tokens: int) -> None:
    """Shards of `rows` sequences, all keys and lengths, and files of keys to ask for."""
    generator = np.random.default_rng(0)
    store = Store([str(where / "store")], REFERENCE)
    asked: dict[int, list[bytes]] = {number: [] for number in ASKED}
    with (where / "keys").open("wb") as all_keys, (where / "lengths").open("wb") as all_lengths:
        for _ in range(0, size, rows):
            keys, lengths = generator.bytes(32 * rows), generator.integers(tokens // 2, 3 * tokens // 2, rows, np.int32)
            store.publish_table(_table(keys, lengths, generator))
            all_keys.write(keys)
            all_lengths.write(lengths.tobytes())
            for number, parts in asked.items():
                parts.append(keys[: 32 * min(rows, max(1, number * rows // size // 2))])
    store.finish()
    for number, parts in asked.items():
        stored = b"".join(parts)[: 32 * (number // 2)]
        keys = np.frombuffer(stored + generator.bytes(32 * number - len(stored)), "V32")
        (where / f"stored-{number}").write_text(str(len(stored) // 32))
        pq.write_table(
            pa.table({"key": _keys(generator.permutation(keys).tobytes())}), where / f"asked-{number}.parquet"
        )


def join(where: Path, size: int) -> None:
    """pairs.parquet of sequences in another order than that of the shards."""
    order = np.random.default_rng(1).permutation(size)
    lengths = np.fromfile(where / "lengths", np.int32)[order]
    keys = _keys(np.fromfile(where / "keys", "V32")[order].tobytes())
    pairs = SimpleNamespace(response_tokens=lengths, schema=PAIRS, groups=lambda: _groups(size // 2))
    sides = ("chosen", "rejected")
    plan = SimpleNamespace(
        pairs=pairs, keys=keys, sides=sides, imported=False, store=Store([str(where / "store")], REFERENCE)
    )
    write_joined(where / "pairs.parquet", plan, {})  # type: ignore[arg-type]
    assert pq.read_metadata(where / "pairs.parquet").num_rows == size // 2
    first = pq.ParquetFile(where / "pairs.parquet").read_row_group(0, columns=["ref_chosen_token_logps"])
    assert np.diff(first.column(0).chunk(0).offsets).tolist() == lengths[0 : 2 * len(first) : 2].tolist()


def _groups(pairs: int) -> Iterator[tuple[int, pa.Table]]:
    """Pairs of a few tokens, without scores."""
    names = [field.name for field in PAIRS if not field.name.startswith("ref_")]
    row = {name: [1, 2, 3] if name.endswith("_ids") else 0 if name == "source_row" else None for name in names}
    schema = pa.schema([PAIRS.field(name) for name in names])
    for first in range(0, pairs, GROUP):
        yield first, pa.Table.from_pylist([row] * min(GROUP, pairs - first), schema=schema)


def _table(keys: bytes, lengths: np.ndarray, generator: np.random.Generator) -> pa.Table:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = -generator.random(int(offsets[-1]), dtype=np.float32)
    columns = [
        _keys(keys),
        pa.array(np.full(len(lengths), 100, np.int32)),
        pa.array(lengths),
        pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), type=SCORES.field("logps").type),
        pa.array(np.add.reduceat(values.astype(np.float64), offsets[:-1])),
    ]
    return pa.table(columns, schema=SCORES)


def _keys(content: bytes) -> pa.FixedSizeBinaryArray:
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(content) // 32, [None, pa.py_buffer(content)])


def _stored(where: Path, keys: pa.FixedSizeBinaryArray) -> int:
    return int((where / f"stored-{len(keys)}").read_text())


def _upload(where: Path, url: str) -> None:
    import fsspec

    files, root = fsspec.url_to_fs(f"{url}/{REFERENCE.reference_id}")
    if not files.exists(root.split("/")[0]):
        files.mkdir(root.split("/")[0])
    here = where / "store" / REFERENCE.reference_id
    for path in [*shard_files(here), *here.glob(f"{INDEX}/*")]:
        files.pipe_file(f"{root}/{path.relative_to(here)}", path.read_bytes())


@contextmanager
def _server(where: Path) -> Iterator[tuple[str, object]]:
    """moto's S3 server: a bucket's URL, and how many requests were made so far."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = where / "requests"
    with log.open("w") as said:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=said, stderr=said
        )
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }  # fmt: skip
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield "s3://bench/scores", lambda: len(re.findall(r"(?:GET|HEAD|PUT|POST|DELETE) /", log.read_text()))
    finally:
        server.terminate()
        server.wait(timeout=30)


@contextmanager
def _place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as where:
        yield Path(where)


def _child(step: str, where: Path, size: int, *options: object) -> tuple[float, float]:
    # each step where it finds no cache of another place
    os.environ["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "tests.benchmarks.store", step, str(where), str(size), *map(str, options)]
    return measure(command, str(where))


def _print(size: int, step: str, seconds: float, peak: float, requests: int | str = "") -> None:
    print(f"{size:12,}  {step:34}{seconds:9.1f}{peak:10.2f}{requests:>10}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
    else:
        main()
