"""`refscore store ...`: what the store holds, and whether it is sound."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

from pipeline.artifacts.runs import RUNS, uses_of_references
from pipeline.config.experiment import Config, ReferenceConfig
from pipeline.errors import CheckError, DataError, first_line
from pipeline.precompute.explain import explain as why
from pipeline.precompute.plan import make_plan
from pipeline.store.adoption import recorded
from pipeline.store.compaction import compact, look
from pipeline.store.inventory import bytes_of, holdings, is_imported, references
from pipeline.store.places import set_aside_if_damaged
from pipeline.store.registrations import registered
from pipeline.store.shard import shard_files
from pipeline.store.store import open_place
from pipeline.store.transfer import copy_rows, copy_shards, described_references
from stages import console


def ls(store: str) -> None:
    """A row for each reference."""
    used, last = uses_of_references()
    rows, found, adoptions = [], [], list[str]()
    references = holdings(store)
    for contents in references:
        registrations = {registration.name for registration in registered(contents.directory) if registration.in_use()}
        names = {*used.get(contents.directory.name, []), *registrations}
        rows.append(
            [
                contents.directory.name[:12],
                contents.numerics,
                f"{contents.sequences:,}",
                f"{contents.tokens:,}",
                str(contents.shards),
                f"{contents.bytes:,}",
                last.get(contents.directory.name, "")[:10] or "never",
                ", ".join(sorted(names)) or "none",
            ]
        )
        last_used = last.get(contents.directory.name) or None
        adopted = recorded(open_place(store, contents.directory.name, first=False), contents.directory.name)
        adoptions += [f"{contents.directory.name[:12]} {adoption.words}" for adoption in adopted.values()]
        found.append(
            {
                "reference_id": contents.directory.name,
                **asdict(contents),
                "last_used": last_used,
                "runs": sorted(names),
                "adopted_from": sorted(adopted),
            }
        )
    console.table(
        str(store), ["reference", "numerics", "sequences", "tokens", "shards", "bytes", "last used", "runs"], rows
    )
    for line in [*adoptions, *(problem for contents in references for problem in contents.problems)]:
        console.say(line)
    console.answer({"store": store, "references": found})


def gc(store: str, *, apply: bool, unreferenced: bool) -> None:
    """Say what could be tidied; with `apply` do it, with `unreferenced` delete what no run uses too."""
    references(store)
    tidy = look(Path(store), set(uses_of_references()[0]))
    for path in tidy.leftovers:
        console.say(f"leftover of a killed writer: {path} ({bytes_of([path]):,} bytes)")
    for directory in tidy.unreferenced:
        size = bytes_of(shard_files(directory))
        lost = "; these scores were imported, and cannot be computed again" if is_imported(directory) else ""
        console.say(f"used by no run in {RUNS} nor by any that is registered in it: {directory} ({size:,} bytes){lost}")
    for directory, groups in tidy.small.items():
        for group in groups:
            console.say(f"small shards: {len(group)} in {directory.name[:12]} could be one")
    if not apply:
        console.say(
            "nothing was changed: --apply removes leftovers and merges shards; with --unreferenced it deletes those too"
        )
        return
    for path in tidy.leftovers:
        path.unlink(missing_ok=True)
    if unreferenced:
        for directory in tidy.unreferenced:
            try:
                shutil.rmtree(directory)
            except OSError as error:
                console.say(f"{directory} cannot be deleted whole ({first_line(error)}): what is left is left")
            else:
                console.say(f"deleted {directory}")
    for directory, groups in tidy.small.items():
        if directory.exists():
            for group in groups:
                try:
                    rows = compact(directory, group)
                except DataError as problem:
                    console.say(f"not merged: {problem}")
                    break
                console.say(f"merged {len(group)} shards of {directory.name[:12]}: {rows:,} sequences")


def verify(store: str) -> None:
    """Check every shard whole. Raises CheckError if some were damaged; those are set aside."""
    bad = checked = 0
    for directory in references(store):
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
            f"{bad} shards were damaged and set aside in corrupt/: the next precompute scores their rows again, or asks for "
            "those that were imported"
        )


def push(store: str | None, to: str, config: Config | None) -> None:
    """Copy scores from the store here to another place: all of them, or those that a configuration's data needs."""
    _copy(store or _own(config), to, config)


def pull(source: str, store: str | None, config: Config | None) -> None:
    """Copy scores from another place to the store here: all of them, or those that a configuration's data needs."""
    _copy(source, store or _own(config), config)


def _own(config: Config | None) -> str:
    """The place that a configuration's scores are written to; without a configuration, the default's."""
    reference = config.reference if config else ReferenceConfig()
    return reference.store[0]


def _copy(source: str, target: str, config: Config | None) -> None:
    console.say(f"from      {source}")
    console.say(f"to        {target}")
    held = described_references(source)
    if config is None:
        copies = copy_shards(source, target, list(held.values()), console.working)
        unit = "shards"
    else:
        plan = make_plan(config)
        identity = plan.identity
        if identity.reference_id not in held:
            raise DataError(
                f"{source} holds nothing of reference {identity.reference_id[:12]} ({identity.numerics.words}): scores are "
                f"found under the same weights and numerics alone. It has {len(held)} other references"
            )
        copies = [copy_rows(plan.keys, source, target, identity, console.working)]
        unit = "sequences"
        console.say(f"needed    {plan.sequences} sequences")
    for copied in copies:
        console.say(
            f"copied    {copied.rows:,} sequences in {copied.shards} shards of {copied.reference_id[:12]}; "
            f"{copied.there:,} {unit} were there"
        )
    if not copies:
        console.say(f"nothing to copy: {source} holds no reference that this version reads")
    unsound = {name: problem for copied in copies for name, problem in copied.unsound.items()}
    for name, problem in unsound.items():
        console.say(f"left out  {name}: {problem}")
    if unsound:
        raise CheckError(
            f"{len(unsound)} shards in {source} are not sound and were left out: 'refscore store verify' where they lie sets "
            "them aside, then their rows are scored again"
        )


def explain(config: Config, row: int | None) -> None:
    """Hit or miss, and on a miss which field or part differs from the nearest that is stored."""
    for sentence in why(config, row):
        console.say(sentence)
