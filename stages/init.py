"""`refscore init DATA`: a configuration for data of one's own, with the number that every value rests on."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from pipeline.artifacts import durable
from pipeline.config.files import load_overrides
from pipeline.errors import ConfigError
from pipeline.models.directories import EMBEDDED
from pipeline.planning.survey import Survey, survey
from stages import console

_DEFAULT = f"embedded:{next(iter(EMBEDDED))}"


def main(data: list[str], model: str | None, out: Path | None, *, force: bool) -> None:
    """Look at data and model, say what is chosen and why, and write the file. Raises ConfigError for a file that is there."""
    out = out or Path(f"{_name_of(data[0])}.yaml")
    if out.exists() and not force:
        raise ConfigError(f"{out} is there already: --out FILE gives another name, --force replaces it")
    found = survey(data, model or _DEFAULT)
    _show_found(found, default=model is None)

    # torch is loaded here, for what a step of training would hold
    from pipeline.planning.proposal import propose

    console.say("simulating steps ...")
    proposal = propose(found)
    load_overrides(proposal.content(), [], "what refscore init chose")
    for choice in proposal.choices:
        console.say(f"chosen    {choice.field}: {choice.shown}  ({choice.because})")
    for remark in proposal.remarks:
        console.say(f"warning   {remark}")
    durable.write_text(out, proposal.text(f"Written by refscore init for {', '.join(data)} and {found.model}."))
    console.say(f"written   {out}; what it takes and what to be careful about: {_command('plan', out)}")
    console.say("next")
    for stage in ("precompute", "train", "eval"):
        console.say(f"          {_command(stage, out)}")


def _show_found(found: Survey, *, default: bool) -> None:
    for name, form in found.formats.items():
        console.say(f"data      {name}: {form}")
    pairs = len(found.lengths)
    console.say(f"rows      {pairs + found.dropped} read, {pairs} pairs")
    for reason, drop in found.drops.items():
        detail = f": {drop.first.detail}" if drop.first.detail else ""
        console.say(f"dropped   {drop.count} x {reason} (first: {drop.first.source} row {drop.first.row}{detail})")
    word = ", which comes with refscore; --model names another: a directory or a Hub id" if default else ""
    console.say(f"model     {found.model}{word}")


def _name_of(data: str) -> str:
    """The data's name as one that can be a run's too."""
    stem = Path(data.removeprefix("embedded:")).name.partition(".")[0]
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-_")
    return name or "experiment"


def _command(stage: str, config: Path) -> str:
    typed = sys.argv[0] if Path(sys.argv[0]).name == "refscore" else "refscore"
    return f"{shlex.quote(typed)} {stage} --config {shlex.quote(str(config))}"
