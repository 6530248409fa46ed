"""`refscore import DATA --by NAME`: scores that others computed enter the store, as what they are: imported, unverified."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from pipeline.config.experiment import Config
from pipeline.config.files import load_overrides
from pipeline.engines.reference import OpenedReference, open_reference
from pipeline.errors import ConfigError, RefscoreError
from pipeline.exchange.importing import Imported, import_scores
from pipeline.pairs.reading.spool import STDIN
from pipeline.precompute.plan import make_plan
from pipeline.store.identity import IMPORTED
from pipeline.store.store import Store
from stages import console
from stages.hashing import hash_weights


def main(data: Path, config: Config, name: str, by: str | None, form: str | None) -> None:
    """Import the scores in `data`, say what became of every row, how far they go, and how they are used.

    `name`: how the configuration was named.
    """
    config = _of_importer(config, by)
    reference = open_reference(config.reference)
    hash_weights(reference)
    console.say(f"reference {reference.identity.reference_id[:12]}  {reference.numerics.words}")
    store = Store(config.reference.store, reference.identity)
    imported = import_scores(data, form, reference, store, config.data)
    _show(imported, data, store)
    _show_coverage(config, reference)
    # as YAML: a name may look like a number
    whose = f"reference.imported_by={json.dumps(config.reference.imported_by, ensure_ascii=False)}"
    used = f"--set reference.engine={IMPORTED} --set {shlex.quote(whose)}"
    console.say(f"use them  refscore precompute --config {shlex.quote(name)} {used}")
    console.say("          then refscore verify --run NAME: it scores a sample again")


def _of_importer(config: Config, by: str | None) -> Config:
    """The configuration with its reference's scores imported by `by`, or by whom it names."""
    named = config.reference.imported_by
    if by is None and named is None:
        raise ConfigError("--by NAME is missing: who computed the scores, as their identity will say")
    if None not in (by, named) and by != named:
        raise ConfigError(f"--by {by!r}, and the configuration says reference.imported_by={named!r}: leave one away")
    values: dict[str, Any] = config.model_dump(mode="json")
    values["reference"] |= {"engine": IMPORTED, "imported_by": by or named}
    return load_overrides(values, [], f"--by {by or named!r}")


def _show(imported: Imported, data: Path, store: Store) -> None:
    console.say(f"data      {data}: the form {imported.form}")
    console.say(f"rows      {imported.rows} read, {imported.kept} kept")
    for reason, drop in imported.dropped.items():
        console.say(f"dropped   {drop.count} {reason} (first: {drop.first})")
    others = [
        f"{count} {words}"
        for count, words in (
            (imported.repeated, "that stand in another row too"),
            (imported.there, "that were imported before"),
        )
        if count
    ]
    console.say(f"sequences {', '.join([f'{imported.new} imported', *others])}; in {store.places[0].name}")
    if imported.known_by_sum:
        console.say(
            f"          of {imported.known_by_sum} of them the store keeps the sum alone, as first imported: another --by keeps "
            "the values per token too"
        )


def _show_coverage(config: Config, reference: OpenedReference) -> None:
    """How far the scores go for the configuration's own data, which tells at once whether token ids are the same."""
    if STDIN in config.data.path:
        console.say("not compared with the data of this configuration: that is standard input")
        return
    try:
        plan = make_plan(config, reference)
    except RefscoreError as problem:
        console.say(f"not compared with the data of this configuration: {problem}")
        return
    known = plan.sequences - len(plan.missing)
    console.say(f"covered   {known} of {plan.sequences} sequences of this configuration's data")
    if not known:
        console.say(
            "warning   none of them: the scores are of other data, or of other token ids (chat template, system prompt, "
            "truncation, end of turn)"
        )
