"""From judgements to win rates: orders and samples of a prompt become one score, prompts become a figure with an interval."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from pipeline.evaluation.rates.length_control import length_controlled, withheld
from pipeline.evaluation.rates.statistics import Interval, detectable, prompts_for, share, sign_test, wilson
from pipeline.judges.judging import Judgement

# a difference of win rates that people care about, for "how many prompts would it take"
WORTH_SEEING = 0.05
# what judges that know no shades say
VERDICTS = (0.0, 0.5, 1.0)
# no probability counts as surer than 999 to 1: one order alone would decide the average
SUREST = 0.999


@dataclass(frozen=True)
class ComparisonScore:
    """What a judge said of one comparison in all orders: None if an order failed. `flipped`: the orders contradict."""

    score: float | None
    flipped: bool


@dataclass(frozen=True)
class WinRate:
    """A judge's verdict over prompts. Ties count half; `failed` comparisons are in no other figure but the bounds.

    `flips` counts comparisons in which the judge contradicted itself when the order changed. `worst` and `best` are the
    rates if every failed comparison had been lost or won. `first_wins` is how often the response that stood first won (0.5:
    no preference for a position), None unless comparisons were asked in both orders. `length_controlled`: see
    `pipeline.evaluation.rates.length_control`; `length_withheld` says why there is none. `detectable` is the difference that
    so many prompts would have shown four times in five, `prompts_needed` how many would show WORTH_SEEING; see
    `pipeline.evaluation.rates.statistics`.
    """

    prompts: int
    rate: Interval
    method: str
    wins: int
    ties: int
    losses: int
    failed: int
    worst: float
    best: float
    comparisons: int
    flips: int
    first_wins: float | None
    sign_test_p: float
    detectable: float | None
    length_controlled: Interval | None = None
    prompts_needed: int | None = None
    length_withheld: str = ""


def comparison_scores(judgements: Iterable[Judgement]) -> dict[tuple[str, int], ComparisonScore]:
    """One score for each comparison of one judge of verdicts and two models, by prompt and sample: a contradiction is a tie."""
    by_comparison = {}
    for comparison, asked in _by_comparison(judgements).items():
        scores = [score for score in asked if score is not None]
        flipped = any(score > 0.5 for score in scores) and any(score < 0.5 for score in scores)
        score = None if len(scores) < len(asked) else 0.5 if flipped else float(np.mean(scores))
        by_comparison[comparison] = ComparisonScore(score, flipped)
    return by_comparison


def both_orders(judgements: Iterable[Judgement]) -> dict[tuple[str, int], ComparisonScore]:
    """One score for each comparison of any one judge and two models, by prompt and sample.

    Verdicts: see `comparison_scores`. Of a judge that gives probabilities the log-odds are averaged over the orders: a
    leaning to one position adds the same log-odds to the one order that it takes from the other (the position term of a
    Bradley-Terry model, Davidson and Beaver 1977), so it cancels and what was said of the responses stays.
    """
    judged = list(judgements)
    verdicts = comparison_scores(judged)
    if all(judgement.score is None or judgement.score in VERDICTS for judgement in judged):
        return verdicts
    asked = _by_comparison(judged)
    return {
        comparison: verdict if verdict.score is None else replace(verdict, score=_mean_log_odds(asked[comparison]))
        for comparison, verdict in verdicts.items()
    }


def prompt_scores(scores: Mapping[tuple[str, int], ComparisonScore]) -> dict[str, float]:
    """The mean over a prompt's comparisons that did not fail, for prompts that have one."""
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for (prompt_id, _), comparison in scores.items():
        if comparison.score is not None:
            by_prompt[prompt_id].append(comparison.score)
    return {prompt_id: float(np.mean(values)) for prompt_id, values in by_prompt.items()}


def win_rate(judgements: Iterable[Judgement], longer_by: Mapping[str, float] | None = None) -> WinRate | None:
    """The win rate of one judge's judgements of two models; None if not a single comparison was judged.

    `longer_by`: prompt -> how much longer the model's responses are than the baseline's, for the length-controlled rate.
    """
    judged = list(judgements)
    scores = both_orders(judged)
    by_prompt = prompt_scores(scores)
    if not by_prompt:
        return None
    means = list(by_prompt.values())
    wins, losses = sum(mean > 0.5 for mean in means), sum(mean < 0.5 for mean in means)
    rate, method = share(means)
    controlled, reason = None, ""
    if longer_by is not None and by_prompt.keys() <= longer_by.keys():
        longer = [longer_by[prompt_id] for prompt_id in by_prompt]
        controlled, reason = length_controlled(means, longer), withheld(means, longer)
    return WinRate(
        prompts=len(means),
        rate=rate,
        method=method,
        wins=wins,
        ties=len(means) - wins - losses,
        losses=losses,
        failed=sum(comparison.score is None for comparison in scores.values()),
        worst=_mean_if_failures_were(0.0, scores),
        best=_mean_if_failures_were(1.0, scores),
        comparisons=len(scores),
        flips=sum(comparison.flipped for comparison in scores.values()),
        first_wins=first_wins(judged),
        sign_test_p=sign_test(wins, losses),
        detectable=detectable(means),
        length_controlled=controlled,
        prompts_needed=prompts_for(means, WORTH_SEEING),
        length_withheld=reason,
    )


def by_topic(judgements: Iterable[Judgement], topics: Mapping[str, str]) -> dict[str, Interval]:
    """Win rate of each topic, by Wilson's interval (topics are small), best first; prompts without one are left out."""
    groups: dict[str, list[float]] = defaultdict(list)
    for prompt_id, score in prompt_scores(both_orders(judgements)).items():
        if prompt_id in topics:
            groups[topics[prompt_id]].append(score)
    rates = {topic: wilson(sum(scores), len(scores)) for topic, scores in groups.items()}
    return dict(sorted(rates.items(), key=lambda item: (-item[1].mean, item[0])))


def _by_comparison(judgements: Iterable[Judgement]) -> dict[tuple[str, int], list[float | None]]:
    asked: dict[tuple[str, int], list[float | None]] = defaultdict(list)
    for judgement in judgements:
        asked[judgement.prompt_id, judgement.sample].append(judgement.score)
    return asked


def _mean_log_odds(scores: Iterable[float | None]) -> float:
    chances = np.clip([score for score in scores if score is not None], 1 - SUREST, SUREST)
    mean = float(np.mean(np.log(chances / (1 - chances))))
    # rounded, so that two orders that cancel are a tie and no win by the last bit
    return round(1 / (1 + float(np.exp(-mean))), 12)


def _mean_if_failures_were(score: float, scores: Mapping[tuple[str, int], ComparisonScore]) -> float:
    filled = {
        comparison: replace(found, score=score) if found.score is None else found
        for comparison, found in scores.items()
    }
    return float(np.mean(list(prompt_scores(filled).values())))


def first_wins(judgements: Iterable[Judgement]) -> float | None:
    """How often the response that was shown first won, over decided verdicts on comparisons that were asked in both orders: in
    one order alone, what is better cannot be told from what stands first.
    """
    asked = list(judgements)
    orders = Counter(judgement.key for judgement in asked)
    won = [
        judgement.winner == judgement.order.removesuffix("_first")
        for judgement in asked
        if orders[judgement.key] > 1
        and judgement.order != "pair"
        and judgement.score is not None
        and judgement.score != 0.5
    ]
    return float(np.mean(won)) if won else None
