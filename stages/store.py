"""`refscore store ...`: what the store holds, and whether it is sound."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from pipeline.errors import CheckError, DataError
from pipeline.runs import existing_runs, open_run, read_json
from pipeline.store import SHARD, check_shard, read_reference, set_aside
from stages import console


def ls(store: Path) -> None:
    """A row for each reference."""
    used: dict[str, list[str]] = {}
    for name in existing_runs():
        used.setdefault(str(read_json(open_run(name).provenance).get("reference_id")), []).append(name)
    rows = []
    for directory in _references(store):
        about = read_reference(directory)["numerics"]
        shards = _shards(directory)
        counts = pl.scan_parquet(shards).select(
            pl.col("key").n_unique(), (pl.col("prompt_tokens") + pl.col("response_tokens")).sum()
        )
        sequences, tokens = counts.collect().row(0) if shards else (0, 0)
        rows.append(
            [
                directory.name[:12],
                f"{about['engine']} {about['engine_version']}, {about['dtype']} on {about['device']}",
                f"{sequences:,}",
                f"{tokens:,}",
                str(len(shards)),
                f"{sum(shard.stat().st_size for shard in shards):,}",
                ", ".join(used.get(directory.name, [])) or "none",
            ]
        )
    console.table(str(store), ["reference", "numerics", "sequences", "tokens", "shards", "bytes", "runs"], rows)


def verify(store: Path) -> None:
    """Check every shard whole. Raises CheckError where some were damaged; those are set aside."""
    bad = checked = 0
    for directory in _references(store):
        for shard in _shards(directory):
            checked += 1
            problem = check_shard(shard)
            if problem:
                bad += 1
                console.say(f"{shard}: {problem}")
                set_aside(shard, problem)
    console.say(f"{checked} shards checked, {bad} damaged")
    if bad:
        raise CheckError(
            f"{bad} shards were damaged and set aside in corrupt/: the next precompute scores their rows again"
        )


def _references(store: Path) -> list[Path]:
    if not store.is_dir():
        raise DataError(f"store {store} does not exist: 'refscore precompute' makes it, or name another with --store")
    return sorted(path.parent for path in store.glob("*/reference.json"))


def _shards(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("scores-*.parquet") if SHARD.fullmatch(path.name))
