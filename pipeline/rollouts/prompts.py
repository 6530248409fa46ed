"""Training prompts that a model answers, and the judge that says how good the answers are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.config.experiment import Config
from pipeline.config.judges import IMPLICIT, JudgeConfig
from pipeline.errors import ConfigError
from pipeline.judges.judging import Prompt
from pipeline.pairs.messages import Message
from pipeline.pairs.splits import PairSet, prompt_id_of, prompt_text


@dataclass(frozen=True)
class TrainingPrompt:
    """A training prompt: the conversation as the data has it, its ids, and the tools that may be called in it."""

    prompt: Prompt
    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)


def training_prompts(pairs: PairSet) -> list[TrainingPrompt]:
    """Distinct prompts of the training split, in the order of the data."""
    prompts: dict[str, TrainingPrompt] = {}
    for pair in pairs.pairs:
        if pair.split == "train":
            messages = pair.preference.prompt
            prompt_id = prompt_id_of(pair.prompt_ids)
            prompt = Prompt(prompt_id, prompt_text(messages), pair.preference.topic or "", pair.prompt_ids)
            prompts.setdefault(prompt_id, TrainingPrompt(prompt, messages, pair.preference.tools))
    return list(prompts.values())


def judge_of_texts(config: Config, name: str | None) -> JudgeConfig:
    """The judge of that name, listed or not; None: the first listed. Raises ConfigError if no judge of texts is configured."""
    of_texts = [judge for judge in config.judge if judge.kind != IMPLICIT]
    judge = next((judge for judge in of_texts if name in (None, judge.shown)), None)
    if judge is None and name is not None:
        return JudgeConfig(name=name)
    if judge is None:
        raise ConfigError("no judge of texts is configured, so nothing can say which response is better: set judge")
    return judge
