"""`refscore store ...`: what the store holds, and whether it is sound."""

from __future__ import annotations

from dataclasses import asdict, replace

from pipeline.artifacts.runs import RUNS, uses_of_references
from pipeline.config.experiment import Config, ReferenceConfig
from pipeline.errors import CheckError, DataError, RefscoreError
from pipeline.precompute.explain import explain as why
from pipeline.precompute.plan import make_plan
from pipeline.store.adoption import recorded
from pipeline.store.places import Entry
from pipeline.store.registrations import registered
from pipeline.store.tidying.compaction import compact_small, groups_of, identified
from pipeline.store.tidying.inventory import holding, is_imported, references, shard_entries
from pipeline.store.tidying.retention import Part, Removal, Rules, bytes_of, parts_of, removals_by, remove
from pipeline.store.transfer import copy_rows, copy_shards, described_references
from stages import console


def ls(store: str) -> None:
    """A row for each reference."""
    used, last = uses_of_references()
    rows, found, adoptions, problems = [], [], list[str](), list[str]()
    for reference_id, place in references(store).items():
        contents = holding(reference_id, place)
        registrations = [run.name for run in registered(place, place.entries()) if run.in_use()]
        names = sorted({*used.get(reference_id, []), *registrations})
        rows.append(
            [
                reference_id[:12],
                contents.numerics,
                f"{contents.sequences:,}",
                f"{contents.tokens:,}",
                str(contents.shards),
                f"{contents.bytes:,}",
                last.get(reference_id, "")[:10] or "never",
                ", ".join(names) or "none",
            ]
        )
        problems += contents.problems
        adopted = recorded(place, reference_id)
        adoptions += [f"{reference_id[:12]} {adoption.words}" for adoption in adopted.values()]
        found.append(
            {
                **asdict(contents),
                "last_used": last.get(reference_id) or None,
                "runs": names,
                "adopted_from": sorted(adopted),
            }
        )
    console.table(store, ["reference", "numerics", "sequences", "tokens", "shards", "bytes", "last used", "runs"], rows)
    for line in [*adoptions, *problems]:
        console.say(line)
    console.answer({"store": store, "references": found})


def gc(store: str, rules: Rules, *, apply: bool) -> None:
    """Say what could be tidied; with `apply` remove what goes by the rules, and merge small shards."""
    parts = parts_of(store, *uses_of_references())
    removals, staying = removals_by(rules, parts)
    for removal in removals:
        _say(removal)
    for removal in removals_by(Rules(unreferenced=True), staying)[0]:
        _say(
            replace(
                removal,
                why=f"used by no run in {RUNS} nor by any that is registered in it, so that --unreferenced deletes it",
            )
        )
    excess = bytes_of(staying) - rules.quota if rules.quota is not None else 0
    if excess > 0:
        spared = (
            "younger than a day"
            if rules.even_used
            else "in use or younger than a day; --even-used takes what runs use too"
        )
        console.say(f"the quota is exceeded by {excess:,} bytes of what stays, as it is {spared}")
    groups = {part.reference_id: groups_of(part.place, part.entries) for part in staying}
    for reference_id, shards in ((name, len(group)) for name, found in groups.items() for group in found):
        console.say(f"small shards: {shards} in {reference_id[:12]} could be one")
    files, size = sum(len(removal.entries) for removal in removals), sum(removal.bytes for removal in removals)
    if not apply:
        console.say(f"nothing was changed: --apply removes {files:,} files of {size:,} bytes, and merges small shards")
        return
    if not removals and not any(groups.values()):
        console.say("nothing to remove, and no small shards to merge")
    for removal in removals:
        name = removal.part.place.name
        try:
            done = remove(removal)
        except RefscoreError as problem:
            console.say(f"{name} cannot be tidied whole: {problem}; what is left is left")
            continue
        if done:
            console.say(f"removed {len(removal.entries):,} files of {removal.bytes:,} bytes from {name}")
        else:
            console.say(f"{name} is left: somebody has used it since it was listed")
    _compact_all(store, staying)


def compact(store: str) -> None:
    """Merge the small shards of every reference; several processes share the work."""
    parts = parts_of(store, *uses_of_references())
    if not any(groups_of(part.place, part.entries) for part in parts):
        console.say("no small shards to merge")
    _compact_all(store, parts)


def verify(store: str) -> None:
    """Check every shard whole. Raises CheckError if some were damaged; those are set aside."""
    bad = checked = 0
    for reference_id, place in references(store).items():
        shards = shard_entries(place.entries())
        with console.working.progress(f"{reference_id[:12]} shards", len(shards)) as ticker:
            for entry in shards:
                try:
                    problem = place.set_aside(entry.name)
                except FileNotFoundError:
                    continue  # merged into another meanwhile
                checked += 1
                if problem:
                    bad += 1
                    console.say(f"{place.name}/{entry.name}: {problem}")
                ticker.advance(1, f"{bad} damaged")
    console.say(f"{checked} shards checked, {bad} damaged")
    if bad:
        raise CheckError(
            f"{bad} shards were damaged and set aside in corrupt/: the next precompute scores their rows again, or asks for "
            "those that were imported"
        )


def _say(removal: Removal) -> None:
    lost = (
        "; these scores were imported, and cannot be computed again"
        if removal.whole and is_imported(removal.part.place)
        else ""
    )
    console.say(
        f"{removal.why}: {len(removal.entries):,} files, {removal.bytes:,} bytes in {removal.part.place.name}{lost}"
    )


def _compact_all(store: str, parts: list[Part]) -> None:
    """Merge what can be merged; raises RefscoreError in the end if a place refused."""
    refused = 0
    for part in parts:
        try:
            _compact(store, part.reference_id, part.entries)
        except RefscoreError as problem:
            console.say(f"not merged: {problem}")
            refused += 1
    if refused:
        raise RefscoreError(f"the small shards of {refused} references could not be merged: what refused stands above")


def _compact(store: str, reference_id: str, entries: list[Entry]) -> None:
    elsewhere = 0
    try:
        for shards, rows in compact_small(identified(store, reference_id), entries):
            if rows is None:
                elsewhere += 1
            else:
                console.say(f"merged {shards} shards of {reference_id[:12]}: {rows:,} sequences")
    except DataError as problem:
        console.say(f"not merged: {problem}")
    if elsewhere:
        console.say(
            f"{elsewhere} groups of shards of {reference_id[:12]} are left: other processes work at them, or fewer than two are "
            "sound"
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
