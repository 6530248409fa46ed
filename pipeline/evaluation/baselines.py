"""What figures would be without any training, by judges that need no model: length alone, the reference cut to sentences,
shuffled labels. And what a figure hides: win rates apart by whether both responses ended by themselves, gain against length.

A win rate that one of these reaches says nothing of what was learned: a policy that only learned to stop wins by a judge
that likes short responses, and so does the untrained reference if its responses are cut.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from pipeline.config.judges import JudgeConfig
from pipeline.evaluation.rates.statistics import Interval, share
from pipeline.evaluation.rates.winrates import ComparisonScore, both_orders, prompt_scores
from pipeline.evaluation.results import Baselines, Split
from pipeline.judges.judging import Comparison, Judge, Judgement, Response, judge_both_orders

# a sentence's end with what closes it: before a space or the end of the text, in Chinese and Japanese before anything.
# Beside Latin marks those of Armenian, Arabic and Urdu, Devanagari, Ethiopic, Burmese and Khmer (Unicode's Sentence_Terminal)
_MARKS = r".!?\u2026\u0589\u061f\u06d4\u0964\u0965\u1362\u1367\u104a\u104b\u17d4\u17d5"
_END = re.compile(
    rf"[{_MARKS}]+[\"'\u201d\u2019\u00bb)\]*_]*(?=\s|$)|[\u3002\uff01\uff1f]+[\u201d\u2019\u300d\u300f\uff09]*"
)
# what stands before the full stop of "1. Wash the rice": no sentence ends there
_LIST_NUMBER = re.compile(r"[\s*_(-]*\d+")

Scores = Mapping[tuple[str, int], ComparisonScore]


def needs_no_model(judge: JudgeConfig) -> bool:
    """Whether the judge is a rule, or a panel of rules: its verdicts cost nothing."""
    return judge.kind == "rule" or (
        judge.kind == "panel" and all(member.startswith("rule:") for member in judge.members)
    )


def first_sentence(text: str) -> str:
    """`text` up to the end of its first whole sentence; all of it if none ends."""
    ends = _sentence_ends(text)
    return text[: ends[0]] if ends else text


def whole_sentences(text: str) -> str:
    """`text` without the sentence that it breaks off in; all of it if no sentence ends."""
    ends = _sentence_ends(text)
    return text[: ends[-1]] if ends else text


def cut_rates(judge: Judge, comparisons: Sequence[Comparison]) -> Baselines:
    """How often a judge prefers the reference's responses cut to sentences to the same responses uncut.

    `comparisons`: of policy and reference. What is cut counts as ended by the model; a response that its model ended keeps
    what follows its last full stop.
    """
    firsts = [_against_itself(item, first_sentence(item.against.text)) for item in comparisons]
    wholes = [
        _against_itself(item, whole_sentences(item.against.text) if _cut_off(item.against) else item.against.text)
        for item in comparisons
    ]
    first, whole = (_rate(both_orders(judge_both_orders(judge, cut))) for cut in (firsts, wholes))
    return Baselines(first_sentence=first, whole_sentences=whole)


@dataclass(frozen=True)
class Pair:
    """A held-out pair as its baselines see it: tokens of both responses, and the margin of its rewards."""

    prompt_id: str
    chosen_tokens: int
    rejected_tokens: int
    margin: float


def pair_baselines(pairs: Sequence[Pair]) -> Baselines:
    """What length alone predicts of held-out pairs (ties half), and the accuracy that 95 of 100 shuffles of their labels have.

    With shuffled labels every margin has either sign with chance one half, so accuracies are binomial.
    """
    scores = {
        (pair.prompt_id, number): ComparisonScore(_shorter(pair.chosen_tokens - pair.rejected_tokens), flipped=False)
        for number, pair in enumerate(pairs)
    }
    decided = sum(pair.margin != 0 for pair in pairs)
    low, mean, high = stats.binom.ppf(0.025, decided, 0.5), decided / 2, stats.binom.ppf(0.975, decided, 0.5)
    shuffled = Interval(mean / len(pairs), float(low) / len(pairs), float(high) / len(pairs), len(pairs))
    return replace(_of_length(scores), shuffled=shuffled)


def length_baselines(judgements: Sequence[Judgement], comparisons: Sequence[Comparison]) -> Baselines:
    """How often one judge prefers the response with fewer tokens, and the one with more, over comparisons of unequal lengths."""
    longer = {
        (item.prompt.prompt_id, item.sample): len(item.response.ids) - len(item.against.ids) for item in comparisons
    }
    scores = {
        comparison: found if found.score is None or longer[comparison] < 0 else replace(found, score=1 - found.score)
        for comparison, found in both_orders(judgements).items()
        if longer.get(comparison)
    }
    return _of_length(scores)


def by_ending(judgements: Sequence[Judgement], comparisons: Sequence[Comparison]) -> dict[str, Split]:
    """The win rate of one judge where both responses were ended by their models, and where one was cut off or both were."""
    kinds = {
        (item.prompt.prompt_id, item.sample): "some cut off"
        if _cut_off(item.response) or _cut_off(item.against)
        else "both ended"
        for item in comparisons
    }
    groups: dict[str, dict[tuple[str, int], ComparisonScore]] = defaultdict(dict)
    for comparison, found in both_orders(judgements).items():
        if comparison in kinds:
            groups[kinds[comparison]][comparison] = found
    splits = {}
    for kind in ("both ended", "some cut off"):
        means = list(prompt_scores(groups[kind]).values())
        if means:
            splits[kind] = Split(len(means), len(groups[kind]), share(means)[0])
    return splits


@dataclass(frozen=True)
class GainByLength:
    """Prompt by prompt how many tokens longer the policy's responses are than the reference's, and by how much a judge
    prefers them: by its `rewards`, else by its scores minus one half. Means over a prompt's samples.
    """

    rewards: bool
    points: list[tuple[float, float]]


def gain_by_length(
    judgements: Sequence[Judgement], margins: Sequence[float | None], comparisons: Sequence[Comparison]
) -> GainByLength:
    """What one judge said of policy and reference; comparisons of which it said nothing are left out.

    `margins`: by how much its reward of the policy's response is higher, comparison by comparison; empty if it gives none.
    """
    scores = both_orders(
        judgement for judgement in judgements if (judgement.model, judgement.baseline) == ("policy", "reference")
    )
    by_prompt: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for item, margin in zip(comparisons, margins or [None] * len(comparisons), strict=True):
        if (item.model, item.baseline) != ("policy", "reference"):
            continue
        score = scores[item.prompt.prompt_id, item.sample].score
        gain = margin if margins else None if score is None else score - 0.5
        if gain is not None:
            by_prompt[item.prompt.prompt_id].append((float(len(item.response.ids) - len(item.against.ids)), gain))
    means = [np.mean(of_prompt, axis=0).tolist() for of_prompt in by_prompt.values()]
    return GainByLength(bool(margins), [(longer, gain) for longer, gain in means])


def together(first: Baselines, second: Baselines) -> Baselines:
    """The baselines that either knows."""
    return Baselines(**{name: known for side in (first, second) for name, known in vars(side).items() if known})


def _of_length(scores: Scores) -> Baselines:
    shorter = _rate(scores)
    longer = None if shorter is None else Interval(1 - shorter.mean, 1 - shorter.high, 1 - shorter.low, shorter.n)
    return Baselines(shorter=shorter, longer=longer)


def _rate(scores: Scores) -> Interval | None:
    means = list(prompt_scores(scores).values())
    return share(means)[0] if means else None


def _shorter(longer_by: int) -> float:
    return float(np.clip(0.5 - longer_by, 0.0, 1.0))


def _cut_off(response: Response) -> bool:
    return response.finish_reason == "length"


def _against_itself(item: Comparison, text: str) -> Comparison:
    """The reference's response as `text` against the same response whole."""
    cut = item.against if text == item.against.text else Response(text, "stop")
    return replace(item, model="cut", baseline="reference", response=cut, against=item.against)


def _sentence_ends(text: str) -> list[int]:
    return [
        match.end()
        for match in _END.finditer(text)
        if not _LIST_NUMBER.fullmatch(text[text.rfind("\n", 0, match.start()) + 1 : match.start()])
    ]
