"""One entry of the configuration's `judge` list: a name that says which judge, and what that judge reads beside it.

Written as a string ("rule:no_repetition") or as a mapping with the fields below. Owns what can be said of a judge before
anything is loaded; refuses fields that the named judge would not read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ModelWrapValidatorHandler, model_serializer, model_validator

from pipeline.config.rubrics import read_rubric
from pipeline.config.rules import rule_problem, seen_by_rule
from pipeline.config.sections import Section
from pipeline.errors import ConfigError

IMPLICIT = "implicit"
# what people voted; nobody configures it
HUMAN = "human"
_OF_A_SERVER = {
    "model", "key_env", "concurrency", "requests_per_minute", "retries", "timeout", "price_in", "price_out", "max_cost",
}  # fmt: skip


class JudgeConfig(Section):
    """A judge by name, with the settings of judges that are models."""

    name: str = Field(
        description="which judge: implicit, rule:, reward_model:, llm:, panel: or annotations:, see docs/evaluation.md"
    )
    label: str | None = Field(None, description="name in tables and files; default: `name`")
    verdict: Literal["token", "reasoning"] = Field(
        "token", description="llm: token: one letter, with its probability; reasoning: free text that ends in a verdict"
    )
    rubric: str | None = Field(
        None, description="llm: file that holds the question in words of one's own; default: the built-in question"
    )
    max_tokens: int = Field(512, ge=16, description="llm with reasoning: longest reply, in tokens")
    min_mass: float = Field(
        0.2, ge=0, le=1, description="llm with token: less probability than this on both letters is a failure"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="reward_model, local llm: auto: float32 on CPU, bfloat16 on a GPU"
    )
    engine: Literal["vllm", "transformers"] = Field("vllm", description="reward_model: what computes the rewards")
    model: str | None = Field(None, description="llm:<url>: the model's name there; default: the only one it serves")
    key_env: str = Field("REFSCORE_JUDGE_KEY", description="llm:<url>: environment variable that holds the key")
    concurrency: int = Field(8, ge=1, description="llm:<url>: requests on their way at once")
    requests_per_minute: float | None = Field(None, gt=0, description="llm:<url>: at most so many; default: no limit")
    retries: int = Field(5, ge=0, description="llm:<url>: further tries of a request that failed for a passing reason")
    timeout: float = Field(120, gt=0, description="llm:<url>: seconds until a request counts as failed")
    price_in: float = Field(
        0, ge=0, allow_inf_nan=False, description="llm:<url>: price of a million prompt tokens, any currency"
    )
    price_out: float = Field(0, ge=0, allow_inf_nan=False, description="llm:<url>: price of a million generated tokens")
    max_cost: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="llm:<url>: asks nothing if the forecast price is higher; default: no limit",
    )

    @model_validator(mode="wrap")
    @classmethod
    def _from_text(cls, value: Any, handler: ModelWrapValidatorHandler[JudgeConfig]) -> JudgeConfig:
        judge = handler({"name": value} if isinstance(value, str) else value)
        problems = [
            problem
            for problem in (
                _name_problem(judge.name),
                _label_problem(judge),
                _unread(judge),
                _unpriced(judge),
                _rubric_problem(judge),
            )
            if problem
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return judge

    @model_serializer
    def _plain(self) -> Any:
        # a judge that is a name and nothing else stays one
        fields = {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}
        return self.name if fields.keys() == {"name"} else fields

    @property
    def shown(self) -> str:
        return self.label or self.name

    @property
    def kind(self) -> str:
        return self.name.partition(":")[0]

    @property
    def argument(self) -> str:
        return self.name.partition(":")[2]

    @property
    def remote(self) -> bool:
        return self.kind == "llm" and is_url(self.argument)

    @property
    def members(self) -> list[str]:
        """Names of a panel's judges."""
        return split_members(self.argument)


def seen_by(judge: JudgeConfig) -> frozenset[str] | None:
    """What a judge's verdicts rest on, as it is declared: what a rule counts, which model is asked; None if it is not known."""
    if judge.kind == "rule":
        return seen_by_rule(judge.argument)
    if judge.kind == "panel":
        of_members = [seen_by(JudgeConfig(name=member)) for member in judge.members]
        known = [seen for seen in of_members if seen is not None]
        return frozenset[str]().union(*known) if len(known) == len(of_members) else None
    return None if judge.kind == IMPLICIT else frozenset([f"the model {judge.model or judge.argument}"])


def pair_judge_problem(name: str) -> str | None:
    """What is wrong with a judge that is to make pairs; None if it can. `implicit` sees no texts, so it cannot."""
    return f"{IMPLICIT} judges no texts" if name == IMPLICIT else _name_problem(name)


def is_url(text: str) -> bool:
    """Whether `text` is an address on the network rather than a path or a Hub id."""
    return text.startswith(("http://", "https://"))


def split_members(argument: str) -> list[str]:
    """The names in "[a, b]"; commas inside nested brackets or parentheses do not separate."""
    inner = argument.strip()
    if not (inner.startswith("[") and inner.endswith("]")):
        return []
    parts, depth, since = [], 0, 1
    for position, sign in enumerate(inner[:-1]):
        depth += (sign in "[({") - (sign in "])}")
        if sign == "," and depth == 1:
            parts.append(inner[since:position])
            since = position + 1
    return [part.strip() for part in [*parts, inner[since:-1]] if part.strip()]


def _name_problem(name: str) -> str | None:
    kind, colon, argument = name.partition(":")
    if kind not in KINDS or bool(KINDS[kind].problem) != bool(colon and argument) or (colon and not argument):
        return f"judge {name!r} is unknown; there are: {'; '.join(facts.form for facts in KINDS.values())}"
    check = KINDS[kind].problem
    return check(name, argument) if check else None


def _panel_problem(name: str, argument: str) -> str | None:
    members = split_members(argument)
    if len(members) < 2:
        return f"judge {name!r}: a panel is written panel:[<judge>, <judge>, ...] and has two judges or more"
    wrong = [member for member in members if member.startswith(("implicit", "panel"))]
    if wrong:
        return f"judge {name!r}: {wrong[0]!r} cannot sit in a panel"
    return next((problem for member in members if (problem := _name_problem(member))), None)


def _llm_problem(name: str, argument: str) -> str | None:
    if not is_url(argument):
        return None
    parts = urlsplit(argument)
    if parts.username or parts.password or re.search(r"(key|token)=", parts.query, re.IGNORECASE):
        # the configuration is saved in the run, and a key must not be
        return "the address of a judge holds a secret: put the key into the environment (key_env)"
    return None if parts.hostname else f"judge {name!r}: the address has no host"


def _annotations_problem(name: str, argument: str) -> str | None:
    return None if Path(argument).expanduser().is_file() else f"judge {name!r}: {argument} is no file"


def _read_by_llm(judge: JudgeConfig) -> set[str]:
    of_the_verdict = {"verdict", "rubric", "max_tokens" if judge.verdict == "reasoning" else "min_mass"}
    return of_the_verdict | (_OF_A_SERVER if judge.remote else {"dtype"})


@dataclass(frozen=True)
class KindFacts:
    """A kind of judges: how its name is written, what is wrong with a name's argument (None: it takes none), which fields
    beside name and label it reads.
    """

    form: str
    problem: Callable[[str, str], str | None] | None
    reads: Callable[[JudgeConfig], set[str]] = lambda _: set()


KINDS = {
    IMPLICIT: KindFacts("implicit: did training move the policy towards the chosen response of held-out pairs", None),
    "rule": KindFacts("rule:<name> or rule:<name>=<argument>", lambda _, argument: rule_problem(argument)),
    "reward_model": KindFacts(
        "reward_model:<directory>: a sequence classifier with one label", lambda *_: None, lambda _: {"dtype", "engine"}
    ),
    "llm": KindFacts(
        "llm:<directory or id>: a local model in vLLM; llm:<http url>: a server that speaks OpenAI's protocol",
        _llm_problem,
        _read_by_llm,
    ),
    "panel": KindFacts("panel:[<judge>, <judge>, ...]: the majority", _panel_problem),
    "annotations": KindFacts(
        "annotations:<file>: verdicts that another tool wrote (AlpacaEval, Arena-Hard)", _annotations_problem
    ),
}


def _unread(judge: JudgeConfig) -> str | None:
    if judge.kind not in KINDS:
        return None  # said of its name
    unread = sorted(judge.model_fields_set - {"name", "label"} - KINDS[judge.kind].reads(judge))
    return f"judge {judge.name!r} does not read {', '.join(unread)}" if unread else None


def _label_problem(judge: JudgeConfig) -> str | None:
    if judge.label == HUMAN:
        return (
            f"judge {judge.name!r}: {HUMAN!r} is no label for it: that name is what people voted on the run's samples"
        )
    # reports tell the judge of held-out pairs from judges of texts by this name
    if judge.label is None or (judge.kind == IMPLICIT) == (judge.label == IMPLICIT):
        return None
    if judge.kind == IMPLICIT:
        return f"judge {IMPLICIT!r} takes no label: figures of held-out pairs are known by that name"
    return f"judge {judge.name!r}: {IMPLICIT!r} is no label for it: that name is the judge of held-out pairs"


def _unpriced(judge: JudgeConfig) -> str | None:
    if judge.max_cost is None or judge.price_in or judge.price_out:
        return None
    return f"judge {judge.name!r}: max_cost says nothing without price_in or price_out"


def _rubric_problem(judge: JudgeConfig) -> str | None:
    if judge.rubric is None:
        return None
    try:
        read_rubric(judge.rubric)
    except ConfigError as error:
        return f"judge {judge.name!r}: {error}"
    return None
