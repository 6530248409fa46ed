"""Training prompts that a model answers, and the judge that says how good the answers are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.config.experiment import Config, DataConfig
from pipeline.config.judges import IMPLICIT, JudgeConfig
from pipeline.errors import ConfigError
from pipeline.judges.judging import Prompt
from pipeline.pairs.groups import ResponseRow, ResponseStream
from pipeline.pairs.messages import Message
from pipeline.pairs.preferences import Dropped
from pipeline.pairs.sources import read_for
from pipeline.pairs.splits import Pair, PairStream, must_train, prompt_id_of, prompt_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainingPrompt:
    """A training prompt: the conversation as the data has it, its ids, and the tools that may be called in it."""

    prompt: Prompt
    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)


def training_prompts(rows: Iterable[Pair | ResponseRow]) -> list[TrainingPrompt]:
    """Distinct prompts of the training split, in the order of the data."""
    prompts: dict[str, TrainingPrompt] = {}
    for row in rows:
        if row.split == "train":
            messages = row.preference.prompt
            prompt_id = prompt_id_of(row.prompt_ids)
            prompt = Prompt(prompt_id, prompt_text(messages), row.preference.topic or "", row.prompt_ids)
            prompts.setdefault(prompt_id, TrainingPrompt(prompt, messages, row.preference.tools))
    return list(prompts.values())


def read_prompts(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Prompt], dict[str, str]]:
    """The training prompts of data of any kind, and the digest of each of its sources.

    Raises DataError if nothing is left to train on, and what reading pairs or responses raises.
    """
    wanted = read_for(data, "prompts")
    stream = PairStream(data, tokenizer) if wanted == "pairs" else ResponseStream(data, tokenizer, wanted=wanted)
    reasons: dict[str, int] = {}

    def kept() -> Iterator[Pair | ResponseRow]:
        for item in stream:
            if isinstance(item, Dropped):
                reasons[item.reason] = reasons.get(item.reason, 0) + 1
            else:
                yield item

    prompts = [request.prompt for request in training_prompts(kept())]
    must_train(len(prompts), data, reasons, "prompt")
    return prompts, dict(stream.digests)


def judge_of_texts(config: Config, name: str | None) -> JudgeConfig:
    """The judge of that name, listed or not; None: the first listed. Raises ConfigError if no judge of texts is configured."""
    of_texts = [judge for judge in config.judge if judge.kind != IMPLICIT]
    judge = next((judge for judge in of_texts if name in (None, judge.shown)), None)
    if judge is None and name is not None:
        return JudgeConfig(name=name)
    if judge is None:
        raise ConfigError("no judge of texts is configured, so nothing can say which response is better: set judge")
    return judge
