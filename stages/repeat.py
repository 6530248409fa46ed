"""`refscore repeat RUN`: the same stages from the same inputs, under another name; or a list of what is no longer the same."""

from __future__ import annotations

from pipeline.artifacts.runs import Run, finished_stages, read_saved_config
from pipeline.config.experiment import Config
from pipeline.config.files import load_overrides
from pipeline.errors import CheckError, ConfigError
from pipeline.planning.repeating import changed_since, same_outcome
from stages import console
from stages.steps import step


def main(run: Run, again: Run, *, check_only: bool) -> None:
    """Say what differs; unless that is an input, or all that was asked, run the stages again and compare."""
    saved = read_saved_config(run)
    if not saved:
        raise ConfigError(f"run {run.name!r} has no configuration: name a run that 'refscore list' shows")
    config = load_overrides(saved, [], str(run.config))
    changed = changed_since(run, config)
    for sentence in changed.inputs:
        console.say(f"changed   {sentence}")
    for sentence in changed.surroundings:
        console.say(f"differs   {sentence}")
    for sentence in changed.unknown:
        console.say(f"unknown   {sentence}")
    if not (changed.inputs or changed.surroundings or changed.unknown):
        console.say("nothing differs: data, models, versions, hardware and commit are those of the run")
    if changed.inputs:
        raise CheckError(
            f"run {run.name!r} cannot be repeated from other inputs: bring back what changed, or train on what is here now "
            f"with --config {run.config}"
        )
    if check_only:
        return
    _must_be_a_repetition(run, again, config)
    done = finished_stages(run)
    for stage in (stage for stage in ("precompute", "rollout", "train", "eval") if stage in done):
        step(stage, run.config, again.name, [])
    console.say("")
    for sentence in same_outcome(run, again):
        console.say(sentence)


def _must_be_a_repetition(run: Run, again: Run, config: Config) -> None:
    """Raise ConfigError if the second run is another experiment's; one of the same settings was begun here, and goes on."""
    theirs = read_saved_config(again)
    same = bool(theirs) and load_overrides(theirs, [], str(again.config)) == config
    if again == run or (again.config.exists() and not same):
        why = "is the run to repeat" if again == run else "exists already, with other settings"
        raise ConfigError(f"run {again.name!r} {why}: name another one with --run")
