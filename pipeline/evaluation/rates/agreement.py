"""Judges against each other and against people: agreement, Cohen's kappa, and what they lean to, as AlpacaEval's analysis.

Two voices are compared where both said something of the same two responses to the same prompt. Orders are put together as in
`pipeline.evaluation.rates.winrates`; of several people on the same responses the majority counts. Intervals are over prompts.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.rates.statistics import RARE, RESAMPLES, SMALL, Interval, share
from pipeline.evaluation.rates.winrates import both_orders, first_wins
from pipeline.judges.annotations import Vote
from pipeline.judges.judging import Comparison, Judgement, majority, winner_of

# (prompt, one response, the other), the responses in the order of their texts
Texts = tuple[str, str, str]
_KINDS = 3


@dataclass(frozen=True)
class Leanings:
    """What a voice prefers whatever the responses say.

    `first_wins`: share of decided verdicts in which the response that stood first won, of comparisons asked in both orders;
    `contradictions`: share of these comparisons in which the orders contradict each other. Both None without such comparisons.
    `longer`: share of decided comparisons of unequal length, in characters, in which the longer response won. `price`: of
    1,000 comparisons, in the currency of the judge's settings, None if it is not known.
    """

    first_wins: float | None
    contradictions: float | None
    longer: Interval | None
    price: float | None


@dataclass(frozen=True)
class Voice:
    """A judge, or the people of one file. `scores`: how sure it is that the response whose text sorts first is better."""

    name: str
    scores: dict[Texts, float]
    leanings: Leanings


@dataclass(frozen=True)
class Agreement:
    """Two voices on the `comparisons` that both judged, of `prompts` prompts.

    `same`: share in which both name the same winner or both a tie. `decided`: that share where neither says tie. `kappa`: Cohen
    1960, (same - chance) / (1 - chance) over the three verdicts, None if each says the same thing everywhere. `longer`: of these
    comparisons, those that a voice decided, how often the longer response won; first voice, second voice.
    """

    first: str
    second: str
    prompts: int
    comparisons: int
    same: Interval
    decided: Interval | None
    kappa: Interval | None
    longer: tuple[Interval | None, Interval | None]


def voice(name: str, votes: Iterable[Vote], price: float | None = None) -> Voice:
    """All that one judge, or the people of one file, said. `price`: of 1,000 comparisons; default: what the votes say it was."""
    votes = list(votes)
    number: dict[Texts, int] = {}
    # a second verdict on the same responses in the same order is another person's
    times: Counter[tuple[str, str, str]] = Counter()
    people: dict[int, list[Judgement]] = defaultdict(list)
    for vote in votes:
        texts = _sorted(*vote.texts)
        if texts[1] == texts[2]:
            continue
        straight = texts[1] == vote.first.strip()
        score = vote.score if vote.score is None or straight else 1.0 - vote.score
        sample = number.setdefault(texts, len(number))
        order = "a_first" if straight else "b_first"
        verdict = Judgement(texts[0], sample, name, "a", "b", order, winner_of(score, "a", "b"), score)
        people[times[texts[0], vote.first, vote.second]].append(verdict)
        times[texts[0], vote.first, vote.second] += 1
    every = list(number)
    said: dict[Texts, list[float | None]] = defaultdict(list)
    contradicted: list[bool] = []
    in_both: list[Judgement] = []
    for person in people.values():
        orders = Counter((verdict.prompt_id, verdict.sample) for verdict in person)
        for key, both in both_orders(person).items():
            said[every[key[1]]].append(both.score)
            if orders[key] > 1 and both.score is not None:
                contradicted.append(both.flipped)
        in_both += [verdict for verdict in person if orders[verdict.prompt_id, verdict.sample] > 1]
    scores = {texts: score for texts, given in said.items() if (score := _one(given)) is not None}
    leanings = Leanings(
        first_wins(in_both),
        float(np.mean(contradicted)) if contradicted else None,
        _longer(scores, scores),
        price if price is not None else _price(votes, len(number)),
    )
    return Voice(name, scores, leanings)


def votes_of(judgements: Iterable[Judgement], comparisons: Iterable[Comparison]) -> dict[str, list[Vote]]:
    """What each judge of a run said of its texts; the implicit judge, which compares no samples, is left out."""
    items = {item.key: item for item in comparisons}
    votes: dict[str, list[Vote]] = defaultdict(list)
    for one in judgements:
        item = items.get(one.key)
        if item is None or one.order == "pair":
            continue
        texts, score = (item.response.text, item.against.text), one.score
        if one.order != f"{one.model}_first":
            texts, score = texts[::-1], None if score is None else 1.0 - score
        votes[one.judge].append(Vote(item.prompt.text, *texts, score))
    return dict(votes)


def agreement(first: Voice, second: Voice) -> Agreement | None:
    """How far two voices agree; None if they judged no comparison in common.

    The unit is the prompt: a prompt's comparisons are averaged. Intervals of shares are those of win rates; kappa's is a
    bootstrap over prompts, or with fewer than 50 or near-unanimous ones that of `same` at the observed chance (Cohen 1960).
    """
    common = sorted(first.scores.keys() & second.scores.keys())
    if not common:
        return None
    same: dict[str, list[float]] = defaultdict(list)
    decided: dict[str, list[float]] = defaultdict(list)
    tables: dict[str, np.ndarray] = defaultdict(lambda: np.zeros((_KINDS, _KINDS)))
    for texts in common:
        one, other = _kind(first.scores[texts]), _kind(second.scores[texts])
        same[texts[0]].append(float(one == other))
        if 1 not in (one, other):
            decided[texts[0]].append(float(one == other))
        tables[texts[0]][one, other] += 1
    rate = share([float(np.mean(values)) for values in same.values()])[0]
    shares = np.stack([table / table.sum() for table in tables.values()])
    return Agreement(
        first.name,
        second.name,
        len(tables),
        len(common),
        rate,
        _over_prompts(decided),
        _kappa_interval(shares, rate),
        (_longer(first.scores, common), _longer(second.scores, common)),
    )


def kappas(tables: np.ndarray) -> np.ndarray:
    """Cohen's kappa of tables of shares [..., kinds, kinds]; NaN where chance agreement is 1."""
    same = np.trace(tables, axis1=-2, axis2=-1)
    chance = (tables.sum(-1) * tables.sum(-2)).sum(-1)
    free = np.where(chance < 1 - 1e-12, 1 - chance, np.nan)
    return np.asarray((same - chance) / free)


def _kappa_interval(shares: np.ndarray, same: Interval) -> Interval | None:
    table = shares.mean(0)
    kappa = float(kappas(table))
    if np.isnan(kappa):
        return None
    number = len(shares)
    if number < SMALL or min(same.mean, 1 - same.mean) * number < RARE:
        chance = float((table.sum(1) * table.sum(0)).sum())
        low, high = ((end - chance) / (1 - chance) for end in (same.low, same.high))
        return Interval(kappa, max(-1.0, low), high, number)
    # prompts of equal tables are as likely as they are many: drawing how many of each kind is the same, and does not grow with them
    kinds, many = np.unique(shares, axis=0, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(number, many / number, RESAMPLES) / number
    resampled = kappas(np.tensordot(drawn, kinds, axes=1))
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return Interval(kappa, float(low), float(high), number)


def _longer(scores: Mapping[Texts, float], of: Iterable[Texts]) -> Interval | None:
    won: dict[str, list[float]] = defaultdict(list)
    for texts in of:
        prompt, first, second = texts
        if scores[texts] != 0.5 and len(first) != len(second):
            won[prompt].append(float((scores[texts] > 0.5) == (len(first) > len(second))))
    return _over_prompts(won)


def _over_prompts(by_prompt: Mapping[str, Sequence[float]]) -> Interval | None:
    return share([float(np.mean(values)) for values in by_prompt.values()])[0] if by_prompt else None


def _kind(score: float) -> int:
    return 1 if score == 0.5 else 0 if score > 0.5 else 2


def _one(scores: Sequence[float | None]) -> float | None:
    return scores[0] if len(scores) == 1 else majority(scores)


def _sorted(prompt: str, first: str, second: str) -> Texts:
    # judges see responses without the space around them
    one, other = sorted((first.strip(), second.strip()))
    return prompt.strip(), one, other


def _price(votes: Sequence[Vote], comparisons: int) -> float | None:
    prices = [vote.price for vote in votes if vote.price is not None]
    return 1000 * sum(prices) / comparisons if prices and comparisons else None
