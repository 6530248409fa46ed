"""`refscore store ...`: what the store holds, and whether it is sound."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.artifacts.runs import RUNS, existing_runs, open_run, read_json
from pipeline.config.experiment import Config
from pipeline.errors import CheckError, ConfigError, DataError, first_line
from pipeline.models.identity import VERSION
from pipeline.precompute.explain import causes, nearest_reference, remember
from pipeline.precompute.plan import make_plan
from pipeline.store.compaction import compact, look
from pipeline.store.places import is_url, set_aside_if_damaged
from pipeline.store.registrations import registered
from pipeline.store.shard import Unsound, key_words, open_shard, shard_files
from pipeline.store.store import read_reference
from stages import console


def ls(store: str) -> None:
    """A row for each reference."""
    used, last = _uses()
    rows = []
    problems: list[str] = []
    for directory in _references(store):
        numerics, problem = _numerics(directory)
        if problem:
            problems.append(problem)
        counts, sizes, damaged = _contents(directory)
        if damaged:
            problems.append(f"{directory}: {damaged} shards cannot be read: 'refscore store verify' sets them aside")
        names = {*used.get(directory.name, []), *(each.name for each in registered(directory) if each.in_use())}
        rows.append(
            [
                directory.name[:12],
                numerics,
                f"{counts[0]:,}",
                f"{counts[1]:,}",
                str(len(sizes)),
                f"{sum(sizes):,}",
                last.get(directory.name, "")[:10] or "never",
                ", ".join(sorted(names)) or "none",
            ]
        )
    console.table(
        str(store), ["reference", "numerics", "sequences", "tokens", "shards", "bytes", "last used", "runs"], rows
    )
    for problem in problems:
        console.say(problem)


def gc(store: str, *, apply: bool, unreferenced: bool) -> None:
    """Say what could be tidied; with `apply` do it, with `unreferenced` delete what no run uses too."""
    _references(store)
    found = look(Path(store), set(_uses()[0]))
    for path in found.leftovers:
        console.say(f"leftover of a killed writer: {path} ({_bytes_of([path]):,} bytes)")
    for directory in found.unreferenced:
        size = _bytes_of(shard_files(directory))
        console.say(f"used by no run in {RUNS} nor by any that is registered in it: {directory} ({size:,} bytes)")
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
            try:
                shutil.rmtree(directory)
            except OSError as error:
                console.say(f"{directory} cannot be deleted whole ({first_line(error)}): what is left is left")
            else:
                console.say(f"deleted {directory}")
    for directory, groups in found.small.items():
        if directory.exists():
            for group in groups:
                try:
                    rows = compact(directory, group)
                except DataError as problem:
                    console.say(f"not merged: {problem}")
                    break
                console.say(f"merged {len(group)} shards of {directory.name[:12]}: {rows:,} sequences")


def _uses() -> tuple[dict[str, list[str]], dict[str, str]]:
    """For each reference the runs of this checkout that use it, and when the last of their stages finished."""
    used: dict[str, list[str]] = {}
    last: dict[str, str] = {}
    for name in existing_runs():
        provenance = read_json(open_run(name).provenance)
        reference = str(provenance.get("reference_id"))
        used.setdefault(reference, []).append(name)
        times = [stage.get("finished", "") for stage in provenance.get("stages", {}).values()]
        last[reference] = max([last.get(reference, ""), *times])
    return used, last


def _numerics(directory: Path) -> tuple[str, str | None]:
    """The reference's numerics in words, and what is wrong with it, if anything is."""
    try:
        content = read_reference(directory)
    except DataError as problem:
        return "unknown", str(problem)
    numerics = content["numerics"]
    engine, version, dtype, device = (
        numerics.get(name, "?") for name in ("engine", "engine_version", "dtype", "device")
    )
    words = f"{engine} {version}, {dtype} on {device}"
    if content.get("version") == VERSION:
        return words, None
    return words, (
        f"{directory}: an identity of version {content.get('version')}, for which this refscore (version {VERSION}) never asks: "
        "its sequences are scored again; 'refscore store gc --apply --unreferenced' deletes it once no run uses it"
    )


def _contents(directory: Path) -> tuple[tuple[int, int], list[int], int]:
    """Sequences and tokens, the bytes of every shard, and how many shards cannot be read."""
    words: list[np.ndarray] = [np.empty((0, 4), np.uint64)]
    tokens: list[np.ndarray] = [np.empty(0, np.int64)]
    sizes: list[int] = []
    damaged = 0
    for shard in shard_files(directory):
        try:
            with open_shard(shard) as file:
                table = file.read(columns=["key", "prompt_tokens", "response_tokens"])
            words.append(key_words(table))
            tokens.append(table["prompt_tokens"].to_numpy().astype(np.int64) + table["response_tokens"].to_numpy())
            sizes.append(shard.stat().st_size)
        except FileNotFoundError:
            continue
        except Unsound:
            damaged += 1
    _, firsts = np.unique(np.concatenate(words), axis=0, return_index=True)
    return (len(firsts), int(np.concatenate(tokens)[firsts].sum())), sizes, damaged


def _bytes_of(paths: list[Path]) -> int:
    size = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


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
            try:
                problem = set_aside_if_damaged(shard)
            except FileNotFoundError:
                continue  # merged into another meanwhile
            checked += 1
            if problem:
                bad += 1
                console.say(f"{shard}: {problem}")
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
    try:
        directories = sorted(Path(store).iterdir())
    except OSError as error:
        raise DataError(f"store {store} cannot be listed ({error.strerror}): mend its rights") from None
    return [directory for directory in directories if (directory / "reference.json").exists()]
