"""The values that judges compare, and how they are asked: every pair in both orders, contradictions recorded, identical
responses never sent.

A judge sees duels, two responses in an order, and says how sure it is that the first is better. Some judges also give a
single response a reward; those need no order, and their rewards can be drawn against what training cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

# what names a comparison: prompt_id, sample, model, baseline
Compared = tuple[str, int, str, str]


@dataclass(frozen=True)
class Prompt:
    """A prompt, as text for people and judges and as ids for the models."""

    prompt_id: str
    text: str
    topic: str = ""
    ids: Sequence[int] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class Response:
    """A response as judges see it; `ids` are there for judges that read the same tokens."""

    text: str
    finish_reason: str
    ids: Sequence[int] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class Shown:
    """One response to a prompt."""

    prompt: Prompt
    response: Response


@dataclass(frozen=True)
class Duel:
    """Two responses to one prompt, in the order in which the judge sees them."""

    prompt: Prompt
    first: Response
    second: Response


@dataclass(frozen=True)
class Comparison:
    """`model` against `baseline` on one prompt: the `sample`-th response of each."""

    prompt: Prompt
    sample: int
    model: str
    baseline: str
    response: Response
    against: Response

    @property
    def key(self) -> Compared:
        return self.prompt.prompt_id, self.sample, self.model, self.baseline


@dataclass(frozen=True)
class Judgement:
    """One row of judgements.parquet; `score` is the model's, None if the judge failed.

    `winner` is the name of a model, "tie" or "failed"; `order` is "<name>_first", or "pair" for the implicit judge; `words`: what
    a judge that writes wrote, or why it wrote nothing.
    """

    prompt_id: str
    sample: int
    judge: str
    model: str
    baseline: str
    order: str
    winner: str
    score: float | None
    words: str | None = None

    @property
    def key(self) -> Compared:
        return self.prompt_id, self.sample, self.model, self.baseline


# how likely the first response is the better one, in [0, 1]; 0.5 a tie; None: no verdict could be had
Prefer = Callable[[Sequence[Duel]], list[float | None]]
Reward = Callable[[Sequence[Shown]], list[float | None]]


@dataclass(frozen=True)
class Judge:
    """A judge by name. `reward` is there if it gives one to single responses; `cost` says what its verdicts took; `words` gives
    what it wrote to duels that it was asked about, None if nothing is known.
    """

    name: str
    prefer: Prefer
    reward: Reward | None = None
    cost: Callable[[], dict[str, float]] = dict
    words: Callable[[Sequence[Duel]], list[str | None]] | None = None


def by_reward(name: str, reward: Reward, tie: float = 0.0) -> Judge:
    """A judge of single responses as one of duels: the higher reward wins, within `tie` nobody does.

    Every response is asked about once, however many duels it stands in; the same text of other tokens is another response.
    """
    rewards: dict[tuple[Shown, tuple[int, ...]], float | None] = {}

    def remembered(items: Sequence[Shown]) -> list[float | None]:
        keys = [(item, tuple(item.response.ids)) for item in items]
        new = {key: item for key, item in zip(keys, items, strict=True) if key not in rewards}
        if new:
            rewards.update(zip(new, reward(list(new.values())), strict=True))
        return [rewards[key] for key in keys]

    def prefer(duels: Sequence[Duel]) -> list[float | None]:
        responses = [Shown(duel.prompt, side) for duel in duels for side in (duel.first, duel.second)]
        values = remembered(responses)
        return [_better(a, b, tie) for a, b in zip(values[::2], values[1::2], strict=True)]

    return Judge(name, prefer, remembered)


def judge_both_orders(judge: Judge, comparisons: Sequence[Comparison]) -> list[Judgement]:
    """Two judgements for each comparison, one an order. Equal responses are ties that no judge is asked about."""
    asked = [(item, straight) for item in comparisons if item.response != item.against for straight in (True, False)]
    duels = [
        Duel(item.prompt, *((item.response, item.against) if straight else (item.against, item.response)))
        for item, straight in asked
    ]
    verdicts = iter(judge.prefer(duels) if duels else [])
    said = iter(judge.words(duels) if judge.words and duels else [None] * len(duels))
    judgements = []
    for item in comparisons:
        for straight in (True, False):
            score: float | None = 0.5
            words = None
            if item.response != item.against:
                first, words = next(verdicts), next(said)
                score = first if first is None or straight else 1.0 - first
            order = f"{item.model if straight else item.baseline}_first"
            winner = winner_of(score, item.model, item.baseline)
            of_what = (item.prompt.prompt_id, item.sample, judge.name, item.model, item.baseline)
            judgements.append(Judgement(*of_what, order, winner, score, words))
    return judgements


def judge_implicitly(name: str, prompt_ids: Sequence[str], margins: Sequence[float]) -> list[Judgement]:
    """Reward margins of held-out pairs as judgements: the policy wins if its margin is above 0."""
    seen: dict[str, int] = {}
    judgements = []
    for prompt_id, margin in zip(prompt_ids, margins, strict=True):
        number = seen[prompt_id] = seen.get(prompt_id, -1) + 1
        score = 0.5 if margin == 0 else float(margin > 0)
        winner = winner_of(score, "policy", "reference")
        judgements.append(Judgement(prompt_id, number, name, "policy", "reference", "pair", winner, score))
    return judgements


def winner_of(score: float | None, model: str, baseline: str) -> str:
    """The word for a model's score."""
    if score is None:
        return "failed"
    return "tie" if score == 0.5 else model if score > 0.5 else baseline


def majority(votes: Sequence[float | None]) -> float | None:
    """The side that more judges prefer: 1 the first, 0 the second, 0.5 as many; None if no judge had a verdict."""
    heard = [vote for vote in votes if vote is not None]
    if not heard:
        return None
    balance = sum(vote > 0.5 for vote in heard) - sum(vote < 0.5 for vote in heard)
    return 0.5 if balance == 0 else float(balance > 0)


def _better(first: float | None, second: float | None, tie: float) -> float | None:
    if first is None or second is None:
        return None
    return 0.5 if first == second or abs(first - second) < tie else float(first > second)
