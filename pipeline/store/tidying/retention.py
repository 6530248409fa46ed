"""What of a store may go: leftovers, references that nobody uses, what was not used for long, what a quota has no room for.

What is younger than a day is in use: somebody may be scoring. A reference was last used when a run last used it, here or
registered at the place, or when something was last published to it; one that was adopted, when the one that adopts it was.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path

from pipeline.artifacts import durable
from pipeline.errors import ConfigError
from pipeline.store.places import ADOPTION, Entry, Place, is_url
from pipeline.store.registrations import DAY, registered
from pipeline.store.tidying.claims import FOLDER as CLAIMS
from pipeline.store.tidying.inventory import REQUESTS, references, shard_entries

_PERIODS = {"h": 3600, "d": DAY, "w": 7 * DAY}
_SIZES = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_DESCRIPTION = "reference.json"
# begins the names of directories in which a driver and its actors share what is to be scored, while they score it
JOB = "job-"


@dataclass(frozen=True)
class Part:
    """One reference's part of a store, as it was listed; `last_used` in seconds since 1970, `runs` those that may need it, `young`
    if somebody may be scoring. `gone` are files of registrations of runs that are no more.
    """

    reference_id: str
    place: Place
    entries: list[Entry]
    last_used: float
    runs: list[str]
    young: bool
    gone: list[str]


@dataclass(frozen=True)
class Removal:
    """Files of one reference that may go, and why, in words; `whole`: everything that is there of it."""

    part: Part
    entries: list[Entry]
    why: str
    whole: bool = True

    @property
    def bytes(self) -> int:
        """Bytes of these files."""
        return sum(entry.bytes for entry in self.entries)


@dataclass(frozen=True)
class Rules:
    """What may go beside leftovers: what no run may need; what was not used `within` so many seconds; what a quota of bytes has
    no room for, `even_used` what a run may need.
    """

    unreferenced: bool = False
    within: float | None = None
    quota: int | None = None
    even_used: bool = False


def parts_of(store: str, used: Mapping[str, list[str]], last: Mapping[str, str]) -> list[Part]:
    """Every reference of a store; `used` and `last` are of the runs here (`pipeline.artifacts.runs.uses_of_references`).

    Links to references elsewhere are left out. Raises DataError and RefscoreError as `references` does.
    """
    places = references(store)
    linked = {name for name in places if not is_url(store) and Path(places[name].name).is_symlink()}
    return _with_adopting(
        [
            _part(name, place, used.get(name, []), last.get(name, ""))
            for name, place in places.items()
            if name not in linked
        ]
    )


def removals_by(rules: Rules, parts: list[Part]) -> tuple[list[Removal], list[Part]]:
    """What goes by these rules, no file twice, and what stays."""
    removals: list[Removal] = []
    for choose in (_leftovers, _unreferenced, _outdated, _beyond_quota):
        chosen = choose(rules, parts)
        removals += chosen
        parts = _staying(parts, chosen)
    return removals, parts


def _leftovers(_: Rules, parts: list[Part]) -> list[Removal]:
    left = [(part, _abandoned(part)) for part in parts]
    why = "left by killed processes or runs that are gone, or damaged and set aside, more than a day ago"
    return [Removal(part, entries, why, whole=False) for part, entries in left if entries]


def _unreferenced(rules: Rules, parts: list[Part]) -> list[Removal]:
    unused = [part for part in parts if rules.unreferenced and not part.runs and not part.young]
    return [Removal(part, part.entries, "used by no run") for part in unused]


def _outdated(rules: Rules, parts: list[Part]) -> list[Removal]:
    if rules.within is None:
        return []
    old = [part for part in parts if not _is_used(part, rules.within) and not part.young]
    return [Removal(part, part.entries, f"not used {_since(part)}") for part in old]


def _beyond_quota(rules: Rules, parts: list[Part]) -> list[Removal]:
    """What was used least recently; of the last reference only so many shards as it takes, those that were published first."""
    if rules.quota is None:
        return []
    excess = bytes_of(parts) - rules.quota
    removals = []
    for part in sorted(parts, key=attrgetter("last_used")):
        spared = part.runs if rules.within is None else _is_used(part, rules.within)
        if excess <= 0 or part.young or (spared and not rules.even_used):
            continue
        removal = Removal(part, part.entries, f"more than the quota, and not used {_since(part)}")
        if removal.bytes > excess:
            removal = replace(removal, entries=_first_published(part, excess), whole=False)
        removals.append(removal)
        excess -= removal.bytes
    return removals


def bytes_of(parts: Iterable[Part]) -> int:
    """Bytes of everything that these parts hold."""
    return sum(entry.bytes for part in parts for entry in part.entries)


def remove(removal: Removal) -> bool:
    """Remove the files, a whole reference's description last; whether that was done: leftovers apart, nothing is removed of a
    reference that somebody has used since it was listed.

    Raises RefscoreError if the place refuses; what is left then is left.
    """
    part, place = removal.part, removal.part.place
    if not all(_is_leftover(part, entry) for entry in removal.entries):
        listed = {(entry.name, entry.changed) for entry in part.entries}
        others = (entry for entry in place.entries() if not _is_leftover(part, entry))
        if any((entry.name, entry.changed) not in listed for entry in others):
            return False
    with ThreadPoolExecutor(REQUESTS) as pool:
        list(pool.map(place.remove, (entry.name for entry in removal.entries if entry.name != _DESCRIPTION)))
    if removal.whole and {entry.name for entry in place.entries()} <= {_DESCRIPTION}:
        place.remove(_DESCRIPTION)
    return True


def seconds_in(text: str) -> float:
    """A length of time: `12h`, `30d`, `8w`. Raises ConfigError."""
    return _measured(text, _PERIODS, "a length of time: give hours, days or weeks, as 12h, 30d, 8w")


def bytes_in(text: str) -> int:
    """A number of bytes: `500GB`, `2TiB`. Raises ConfigError."""
    return int(_measured(text, _SIZES, "a size: give a number and a unit, as 500GB, 1.5TB, 200GiB"))


def _measured(text: str, units: Mapping[str, int], what: str) -> float:
    said = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-zA-Z]+)", text)
    for unit, value in units.items():
        if said and said[2].lower() == unit.lower():
            return float(said[1]) * value
    raise ConfigError(f"{text!r} is not {what}")


def _part(reference_id: str, place: Place, used_here: list[str], last_here: str) -> Part:
    entries = place.entries()
    registrations = registered(place, entries)
    times = [entry.changed for entry in entries if not _is_left(entry)]
    times += [registration.used for registration in registrations]
    with suppress(ValueError):
        times.append(datetime.fromisoformat(last_here).timestamp())
    runs = {*used_here, *(registration.name for registration in registrations if registration.in_use())}
    latest = max(registrations, key=attrgetter("used"), default=None)  # says when the reference was last used
    gone = [one.file for one in registrations if one is not latest and not one.in_use()]
    young = any(_age(entry) < DAY for entry in entries)
    return Part(reference_id, place, entries, max(times, default=0.0), sorted(runs), young, gone)


def _with_adopting(parts: list[Part]) -> list[Part]:
    """The parts; one that was adopted is used by whom the one that adopts it is used, and as lately."""
    adopting: dict[str, list[Part]] = {}
    for part in parts:
        for adopted in (found[1] for entry in part.entries if (found := ADOPTION.fullmatch(entry.name))):
            adopting.setdefault(adopted, []).append(part)
    return [
        replace(
            part,
            last_used=max(one.last_used for one in (part, *adopting.get(part.reference_id, []))),
            runs=sorted({run for one in (part, *adopting.get(part.reference_id, [])) for run in one.runs}),
            young=any(one.young for one in (part, *adopting.get(part.reference_id, []))),
        )
        for part in parts
    ]


def _staying(parts: list[Part], removals: list[Removal]) -> list[Part]:
    going = {removal.part.reference_id: removal for removal in removals}
    left = []
    for part in parts:
        removal = going.get(part.reference_id)
        if removal is None or not removal.whole:
            names = {entry.name for entry in removal.entries} if removal else set()
            left.append(replace(part, entries=[entry for entry in part.entries if entry.name not in names]))
    return left


def _since(part: Part) -> str:
    """Since when nothing used a reference, and which runs may still need it."""
    runs = f" (by {', '.join(part.runs)})" if part.runs else ""
    return f"since {datetime.fromtimestamp(part.last_used, UTC).date()}{runs}"


def _is_used(part: Part, seconds: float) -> bool:
    return time.time() - part.last_used <= seconds


def _is_left(entry: Entry) -> bool:
    return entry.name.startswith(("corrupt/", CLAIMS, JOB)) or Path(entry.name).name.startswith(durable.TEMPORARY)


def _abandoned(part: Part) -> list[Entry]:
    """What was left more than a day ago; of a job what it was written with too, once nothing in it changes any more."""
    changed: dict[str, float] = {}
    for entry in part.entries:
        changed[_together(entry)] = max(changed.get(_together(entry), 0.0), entry.changed)
    return [
        entry
        for entry in part.entries
        if _is_leftover(part, entry) and (entry.name in part.gone or time.time() - changed[_together(entry)] > DAY)
    ]


def _is_leftover(part: Part, entry: Entry) -> bool:
    """Whether an entry may have been left, by what it is called: it is no use of the reference, if nothing else is."""
    return entry.name in part.gone or (_is_left(entry) and _age(entry) > DAY)


def _together(entry: Entry) -> str:
    return entry.name.split("/")[0] if entry.name.startswith(JOB) else entry.name


def _age(entry: Entry) -> float:
    return time.time() - entry.changed


def _first_published(part: Part, size: int) -> list[Entry]:
    """The shards that were published first, together at least `size` bytes, or all that there are."""
    chosen: list[Entry] = []
    for entry in sorted(shard_entries(part.entries), key=attrgetter("changed", "name")):
        if size <= 0:
            break
        chosen.append(entry)
        size -= entry.bytes
    return chosen
