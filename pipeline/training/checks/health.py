"""Does a training go wrong? Its metrics in, findings out; an empty list is a healthy run.

Thresholds are rules of thumb of the field (axolotl's table of healthy indicators; Razin et al. 2024, 2410.08847, on
likelihood displacement), said in the sentences, so that a reader can disagree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pipeline.config.losses import data_of
from pipeline.config.training import TrainConfig

# before this share of the steps is done nothing is said
_EARLY = 0.25
_FEWEST_STEPS = 8
_LN_2 = math.log(2)

Row = Mapping[str, float | None]


class Finding(NamedTuple):
    """What looks wrong: its kind, which stays the same from one evaluation to the next, and a sentence with the figures."""

    kind: str
    sentence: str


def findings(rows: Sequence[Row], train: TrainConfig, steps: int) -> list[Finding]:
    """What rows of metrics.parquet say (one per step, evaluations with `eval_`) of a training of `steps` steps."""
    done = [row for row in rows if row.get("loss") is not None]
    if not done or len(done) < max(_FEWEST_STEPS, _EARLY * steps / train.logging_steps):
        return []
    recent = done[-max(4, len(done) // 4) :]
    sentences = {
        "stuck": _stuck(recent, train),
        "below chance": _chance(rows, recent, train),
        "displaced": _displaced(done, recent, train),
        "gradient norms": _norms(recent),
        "overfitted": _overfit(rows),
    }
    return [Finding(kind, sentence) for kind, sentence in sentences.items() if sentence]


def length_words(metrics: Sequence[Row], policy_tokens: float, reference_tokens: float) -> list[str]:
    """Sentences about what generation shows: mean tokens of both models' responses beside the training's rewards."""
    chosen = [row["rewards/chosen"] for row in metrics if row.get("rewards/chosen") is not None]
    falling = bool(chosen) and chosen[-1] is not None and chosen[-1] < 0
    if policy_tokens > 2 * reference_tokens:
        also = ", while the chosen responses became less likely" if falling else ""
        sentence = (
            f"The policy's responses are {policy_tokens / reference_tokens:.1f} times as long as the reference's{also}: "
            "look for padding and loops, and compare with length-controlled win rates, train.ld_alpha or sigmoid_norm."
        )
        return [sentence]
    return []


def _stuck(recent: Sequence[Row], train: TrainConfig) -> str | None:
    if train.loss_type != ["sigmoid"] and train.objective == "preference":
        return None
    loss = _mean(recent, "loss")
    if abs(loss - _LN_2) < 0.003 and abs(_mean(recent, "rewards/margins")) < 0.01:
        return (
            f"The loss stays at ln 2 ({loss:.4f} over the last {len(recent)} logged steps): the policy hardly moves. "
            "Raise train.learning_rate or train longer."
        )
    return None


def _chance(rows: Sequence[Row], recent: Sequence[Row], train: TrainConfig) -> str | None:
    held_out = [row["eval_rewards/accuracies"] for row in rows if row.get("eval_rewards/accuracies") is not None]
    name, accuracy = "held-out", held_out[-1] if len(held_out) > 1 else None
    if accuracy is None:
        name, accuracy = "training", _mean(recent, "rewards/accuracies")
    if accuracy < 0.5 and data_of(train) == "responses":
        return (
            f"Of the {name} responses {accuracy:.2f} lie on their label's side of the baseline, less than half: is the learning "
            "rate too high, are good and bad swapped, or has one label too little weight (train.desirable_weight, "
            "train.undesirable_weight)?"
        )
    if accuracy < 0.5:
        return (
            f"The {name} reward accuracy is {accuracy:.2f}, below chance: are chosen and rejected swapped, is the "
            "learning rate too high, or do the pairs contradict one another?"
        )
    return None


def _displaced(done: Sequence[Row], recent: Sequence[Row], train: TrainConfig) -> str | None:
    chosen, margin = _mean(recent, "rewards/chosen"), _mean(recent, "rewards/margins")
    # a loss of pairs goes with no other data
    means = (
        "fewer steps or an sft term (train.loss_type=[sigmoid,sft])" if data_of(train) == "pairs" else "or fewer steps"
    )
    if chosen < -1 and chosen < _mean(done[:4], "rewards/chosen") and margin > 0:
        return (
            f"The chosen responses became less likely too (reward {chosen:.2f} at a margin of {margin:.2f}): likelihood "
            f"moves to responses that are in no pair. Watch lengths and loops; a higher train.beta, {means} hold it."
        )
    return None


def _norms(recent: Sequence[Row]) -> str | None:
    norm = max(float(row["grad_norm"] or 0) for row in recent if row.get("grad_norm") is not None)
    if norm > 100:
        return (
            f"Gradient norms reach {norm:.0f}: steps are clipped to nothing. Lower train.learning_rate or train.beta."
        )
    return None


def _overfit(rows: Sequence[Row]) -> str | None:
    losses = [float(row["eval_loss"] or 0) for row in rows if row.get("eval_loss") is not None]
    if len(losses) > 2 and losses[-1] > 1.1 * min(losses[1:]) and losses[-1] > losses[0] * 0.9:
        return (
            f"The held-out loss rose from {min(losses):.3f} to {losses[-1]:.3f}: the policy learns the pairs by heart. "
            "Fewer epochs or a lower train.learning_rate."
        )
    return None


def _mean(rows: Sequence[Row], name: str) -> float:
    values = [float(row[name] or 0) for row in rows if row.get(name) is not None]
    return sum(values) / len(values) if values else math.nan
