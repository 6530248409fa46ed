"""`refscore store ...`: what the store holds, and whether it is sound."""

from __future__ import annotations

import shutil
from pathlib import Path

import polars as pl
import pyarrow as pa

from pipeline.compaction import compact, look
from pipeline.config import Config
from pipeline.errors import CheckError, ConfigError, DataError
from pipeline.explain import causes, nearest_reference, remember
from pipeline.precompute import make_plan
from pipeline.runs import RUNS, existing_runs, open_run, read_json
from pipeline.shelf import is_url, set_aside, shard_files
from pipeline.store import check_shard, read_reference
from stages import console


def ls(store: str) -> None:
    """A row for each reference."""
    used: dict[str, list[str]] = {}
    last: dict[str, str] = {}
    for name in existing_runs():
        provenance = read_json(open_run(name).provenance)
        reference = str(provenance.get("reference_id"))
        used.setdefault(reference, []).append(name)
        times = [stage.get("finished", "") for stage in provenance.get("stages", {}).values()]
        last[reference] = max([last.get(reference, ""), *times])
    rows = []
    for directory in _references(store):
        about = read_reference(directory)["numerics"]
        shards = shard_files(directory)
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
                last.get(directory.name, "")[:10] or "never",
                ", ".join(used.get(directory.name, [])) or "none",
            ]
        )
    console.table(
        str(store), ["reference", "numerics", "sequences", "tokens", "shards", "bytes", "last used", "runs"], rows
    )


def gc(store: str, *, apply: bool, unreferenced: bool) -> None:
    """Say what could be tidied; with `apply` do it, with `unreferenced` delete what no run here uses too."""
    _references(store)
    used = {str(read_json(open_run(name).provenance).get("reference_id")) for name in existing_runs()}
    found = look(Path(store), used)
    for path in found.leftovers:
        console.say(f"leftover of a killed writer: {path} ({path.stat().st_size:,} bytes)")
    for directory in found.unreferenced:
        size = sum(shard.stat().st_size for shard in shard_files(directory))
        console.say(f"used by no run in {RUNS}: {directory} ({size:,} bytes)")
    for directory, groups in found.small.items():
        for group in groups:
            console.say(f"small shards: {len(group)} in {directory.name[:12]} could be one")
    if not apply:
        console.say(
            "nothing was changed: --apply removes leftovers and merges shards; with --unreferenced it deletes those too"
        )
        return
    for path in found.leftovers:
        path.unlink(missing_ok=True)
    if unreferenced:
        for directory in found.unreferenced:
            shutil.rmtree(directory)
            console.say(f"deleted {directory}")
    for directory, groups in found.small.items():
        if directory.exists():
            for group in groups:
                rows = compact(directory, group)
                console.say(f"merged {len(group)} shards of {directory.name[:12]}: {rows:,} sequences")


def explain(config: Config, row: int | None) -> None:
    """Hit or miss, and on a miss which field or part differs from the nearest that is stored."""
    plan = make_plan(config)
    places = [Path(place) for place in config.reference.store if not is_url(place)]
    reference = plan.identity.reference_id
    source_rows = plan.pairs.source_rows()
    positions = [at for at in range(len(plan.keys)) if row is None or source_rows[at // 2] == row]
    if not positions:
        raise DataError(f"no pair comes from row {row}: 'refscore validate' says what was dropped and why")
    absent = set(plan.keys.take(pa.array(plan.missing)).to_pylist())
    misses = [at for at in positions if plan.keys[at].as_py() in absent]
    console.say(f"reference {reference[:12]}: {len(positions) - len(misses)} hits, {len(misses)} misses")
    if not misses:
        return
    # a store at a URL tells its references by its hits only
    if len(absent) == plan.sequences and not any((place / reference / "reference.json").exists() for place in places):
        nearest = nearest_reference(plan.identity.described(), places)
        if nearest is None:
            console.say("no directory of the store holds a reference yet: every sequence is a miss")
            return
        console.say(f"no score of this reference is stored; the nearest is {nearest[0].name[:12]}, which differs in:")
        for words in nearest[1]:
            console.say(f"  {words}")
        return
    found = causes(plan, misses, remember([open_run(name) for name in existing_runs()]))
    for (cause,), rows in found.group_by("cause", maintain_order=True):
        shown = ", ".join(
            f"row {number} {side}" for number, side in rows.select("source_row", "side").head(5).iter_rows()
        )
        console.say(f"  {len(rows)} x {cause}: {shown}{' ...' if len(rows) > 5 else ''}")


def verify(store: str) -> None:
    """Check every shard whole. Raises CheckError where some were damaged; those are set aside."""
    bad = checked = 0
    for directory in _references(store):
        for shard in shard_files(directory):
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


def _references(store: str) -> list[Path]:
    if is_url(store):
        raise ConfigError(
            f"{store}: only directories are listed and tidied here; a bucket's own tools do that for a URL"
        )
    if not Path(store).is_dir():
        raise DataError(f"store {store} does not exist: 'refscore precompute' makes it, or name another with --store")
    return sorted(path.parent for path in Path(store).glob("*/reference.json"))
