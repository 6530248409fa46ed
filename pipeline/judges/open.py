"""Opens judges by name: what the configuration lists under `judge`, as functions of one signature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.artifacts.durable import file_name
from pipeline.config.judges import JudgeConfig
from pipeline.judges.annotations import open_annotations
from pipeline.judges.judging import Duel, Judge, majority
from pipeline.judges.memory import Verdicts, verdict_key
from pipeline.judges.rules import open_rule
from pipeline.progress import SILENT, Listener


@dataclass(frozen=True)
class JudgeContext:
    """What judges need of their surroundings.

    `verdicts`: the directory in which model judges keep what they said. `listed`: the configuration's judges, whose
    settings a panel's members take. `tokens`: digests of the vocabulary and template that made the samples' ids.
    `listener`: who hears how far a judge that is asked has come.
    """

    verdicts: Path
    listed: Sequence[JudgeConfig] = ()
    tokens: tuple[str, str] | None = None
    listener: Listener = SILENT
    # a judge that is listed and sits in a panel is one judge with one file
    opened: dict[str, Verdicts] = field(default_factory=dict)


def open_judge(settings: JudgeConfig, context: JudgeContext) -> Judge:
    """The judge of texts of that name; `implicit` is none. Raises ConfigError if its model cannot be found."""
    if settings.kind == "rule":
        return open_rule(settings.argument, settings.shown)
    if settings.kind == "annotations":
        return open_annotations(Path(settings.argument).expanduser(), settings.shown)
    if settings.kind == "panel":
        return _panel(settings, context)
    # a readable name, and a digest because two judge names may map to the same file name
    file = f"{file_name(settings.shown)[:60]}-{verdict_key('', [settings.name])[:8]}.jsonl"
    verdicts = context.opened.get(file)
    if verdicts is None:
        verdicts = context.opened[file] = Verdicts(context.verdicts / file)
    if settings.kind == "reward_model":
        from pipeline.judges.reward_model import open_reward_model

        return open_reward_model(settings, verdicts, context.tokens)
    if settings.remote:
        from pipeline.judges.remote import open_remote

        return open_remote(settings, verdicts, context.listener)
    from pipeline.judges.local import open_local

    return open_local(settings, verdicts, context.listener)


def _panel(settings: JudgeConfig, context: JudgeContext) -> Judge:
    listed = {judge.name: judge for judge in context.listed}
    members = [open_judge(listed.get(name) or JudgeConfig.model_validate(name), context) for name in settings.members]

    def prefer(duels: Sequence[Duel]) -> list[float | None]:
        return [majority(votes) for votes in zip(*(member.prefer(duels) for member in members), strict=True)]

    def cost() -> dict[str, float]:
        total: dict[str, float] = {}
        for member in members:
            for name, value in member.cost().items():
                total[name] = total.get(name, 0) + value
        return total

    def words(duels: Sequence[Duel]) -> list[str | None]:
        said = [(member.name, member.words(duels)) for member in members if member.words]
        lines = [[f"{name}: {of_one[place]}" for name, of_one in said if of_one[place]] for place in range(len(duels))]
        return ["\n".join(of_duel) or None for of_duel in lines]

    return Judge(settings.shown, prefer, cost=cost, words=words)
