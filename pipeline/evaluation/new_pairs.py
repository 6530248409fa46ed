"""New preference pairs: several responses of a model to training prompts, scored by a judge, best against worst.

The same code made data/demo. Held-out prompts are never sampled here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.engines.vllm.generator import Sample
from pipeline.judges.judging import Judge, Response, Shown
from pipeline.judges.marks import marks, words_of
from pipeline.rollouts.prompts import TrainingPrompt
from pipeline.rollouts.rewards import score_responses


@dataclass(frozen=True)
class Choice:
    """Which response is preferred to which, as positions in the scored list, and by how much."""

    chosen: int
    rejected: int
    margin: float


@dataclass(frozen=True)
class NewPair:
    """A new pair: which of the prompt's samples, and what the judge gave all of them."""

    request: TrainingPrompt
    samples: Sequence[Sample]
    scores: list[float]
    choice: Choice


def make_pairs(
    judge: Judge,
    requests: Sequence[TrainingPrompt],
    samples: Sequence[Sequence[Sample]],
    margin: float,
    accept: Callable[[Sample], bool] = lambda _: True,
    *,
    must_end: bool = True,
) -> tuple[list[NewPair], dict[str, int]]:
    """Pairs of the prompts whose best and worst response are `margin` or more apart, and how often each reason had none.

    The best must have ended by itself if it `must_end`, else a policy would learn to go on for ever, and please `accept`; the
    worst must say something.
    """
    scores = score_samples(judge, requests, samples)
    pairs = []
    reasons = {"near_tie": 0, "best_is_cut_off": 0, "best_is_refused": 0, "worst_is_empty": 0, "judge_failed": 0}
    for request, written, verdicts in zip(requests, samples, scores, strict=True):
        judged = [score for score in verdicts if score is not None]
        if len(judged) < len(verdicts):
            reasons["judge_failed"] += 1
            continue
        choice = best_and_worst(judged, margin)
        if choice is None:
            reasons["near_tie"] += 1
        elif must_end and written[choice.chosen].finish_reason != "stop":
            reasons["best_is_cut_off"] += 1
        elif not accept(written[choice.chosen]):
            reasons["best_is_refused"] += 1
        elif not written[choice.rejected].text.strip():
            reasons["worst_is_empty"] += 1
        else:
            pairs.append(NewPair(request, written, judged, choice))
    return pairs, {reason: count for reason, count in reasons.items() if count}


def best_and_worst(scores: Sequence[float], margin: float) -> Choice | None:
    """The highest- against the lowest-scored response; None if they are nearer than `margin` (a near-tie).

    Among equal scores the earlier response is taken, so the choice depends on nothing but the scores.
    """
    if len(scores) < 2:
        return None
    chosen = max(range(len(scores)), key=lambda index: (scores[index], -index))
    rejected = min(range(len(scores)), key=lambda index: (scores[index], index))
    distance = scores[chosen] - scores[rejected]
    return Choice(chosen, rejected, distance) if distance >= margin else None


def score_samples(
    judge: Judge, requests: Sequence[TrainingPrompt], samples: Sequence[Sequence[Sample]]
) -> list[list[float | None]]:
    """One score for each sample of each prompt; None if the judge failed."""
    shown = [
        [
            Shown(request.prompt, Response(sample.text.strip(), sample.finish_reason, tuple(sample.ids)))
            for sample in written
        ]
        for request, written in zip(requests, samples, strict=True)
    ]
    return score_responses(judge, shown)


def pair_row(pair: NewPair, provenance: dict[str, Any]) -> dict[str, Any]:
    """A line of preference data: prompt (a string, or messages if it is a conversation), sides, margin, provenance."""
    chosen, rejected = pair.samples[pair.choice.chosen], pair.samples[pair.choice.rejected]
    messages = pair.request.messages
    single = len(messages) == 1 and messages[0]["role"] == "user"
    prompt: Any = messages[0]["content"] if single else messages
    sides = {"chosen": chosen, "rejected": rejected}
    responses: dict[str, Any] = {name: side.text for name, side in sides.items()}
    if not single:
        responses = {name: [{"role": "assistant", "content": text}] for name, text in responses.items()}
    return {
        **({"topic": pair.request.prompt.topic} if pair.request.prompt.topic else {}),
        "prompt": prompt,
        **({"tools": pair.request.tools} if pair.request.tools else {}),
        **responses,
        **{f"{name}_cut_off": True for name, side in sides.items() if side.finish_reason != "stop"},
        "margin": round(pair.choice.margin, 3),
        "differs_beyond_length": beyond_length(pair.request.prompt.text, chosen, rejected),
        "provenance": provenance
        | {
            "chosen_score": round(pair.scores[pair.choice.chosen], 4),
            "rejected_score": round(pair.scores[pair.choice.rejected], 4),
            "chosen_sample": pair.choice.chosen,
            "rejected_sample": pair.choice.rejected,
        },
    }


def beyond_length(prompt: str, chosen: Sample, rejected: Sample) -> bool:
    """Whether `chosen` is better in more than length: less repetition, more to the point, or of about equal length."""
    better, worse = (marks(prompt, sample.text, sample.finish_reason) for sample in (chosen, rejected))
    lengths = sorted((len(words_of(chosen.text)), len(words_of(rejected.text))))
    return (
        better.distinct - worse.distinct >= 0.1
        or better.relevant - worse.relevant >= 0.25
        or lengths[0] >= 0.8 * lengths[1]
    )
