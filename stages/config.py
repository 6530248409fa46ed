"""`refscore config [FIELD]`: the fields of a configuration, looked up in the terminal; --schema for editors."""

from __future__ import annotations

import difflib
import textwrap

from pipeline.config.reference import FieldFacts, fields_of, schema, sections
from pipeline.errors import ConfigError
from stages import console

_WIDTH = 80


def main(name: str | None, *, as_schema: bool) -> None:
    """Print every section's fields, one section's, or one field's. Raises ConfigError for a name that is none."""
    if as_schema:
        if name is not None:
            raise ConfigError("--schema is that of a whole file: leave the name out")
        console.answer_alone(True)
        console.answer(schema())
        return
    known = sections()
    fields = {fact.name: fact for section, model in known.items() for fact in fields_of(model, f"{section}.")}
    if name is None:
        for section in known:
            _show_section(section, [fact for fact in fields.values() if fact.name.rpartition(".")[0] == section])
        console.say(
            "'refscore config FIELD' says all of a field, e.g. train.beta; 'refscore config SECTION' of a section"
        )
    elif name in known:
        for fact in fields.values():
            if fact.name.rpartition(".")[0] == name:
                _show_field(fact)
    elif found := [fact for fact in fields.values() if name in (fact.name, fact.name.rpartition(".")[2])]:
        for fact in found:
            _show_field(fact)
    else:
        near = difflib.get_close_matches(name, [*known, *fields], n=1, cutoff=0.5)
        raise ConfigError(
            f"no field or section is called {name!r}" + (f", did you mean {near[0]!r}?" if near else "") + ": "
            "'refscore config' lists them"
        )


def _show_section(section: str, facts: list[FieldFacts]) -> None:
    console.say(f"\n{section}: {(sections()[section].__doc__ or '').splitlines()[0]}")
    wide = max(len(fact.name.rpartition(".")[2]) for fact in facts)
    for fact in facts:
        line = f"  {fact.name.rpartition('.')[2]:{wide}}  {_default(fact)}{fact.says}"
        console.say(_folded(line, wide + 4))


def _show_field(fact: FieldFacts) -> None:
    console.say(fact.name)
    rows = {"type": fact.type, "default": fact.default, "limits": fact.limits, "meaning": fact.says}
    for label, text in rows.items():
        if text:
            console.say(_folded(f"  {label:8} {text}", 11))


def _default(fact: FieldFacts) -> str:
    return f"[{fact.default}] " if fact.default else ""


def _folded(line: str, indent: int) -> str:
    return "\n".join(
        textwrap.wrap(line, _WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False)
    )
