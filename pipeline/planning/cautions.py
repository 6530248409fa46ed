"""What should be known of the data before anything is scored or trained: each with its number and what to set.

Read from a plan: no row is read twice. A caution stops nothing. Columns that nothing reads are named by the reader itself.
"""

from __future__ import annotations

import math
import re

import numpy as np

from pipeline.config.experiment import Config
from pipeline.models.configuration import position_limit
from pipeline.pairs.kinds import UNITS
from pipeline.pairs.tokenised.making import DAY
from pipeline.precompute.plan import Plan

# fewer held-out pairs than this give intervals that say little
ENOUGH_HELD_OUT = 20
_MANY_DROPPED, _ONE_SIDED, _KEPT = 0.1, 0.8, 0.95
# weighted good to bad responses
_BALANCED = (1.0, 4 / 3)
_SOME_PAIRS = 10  # of fewer, most may have the longer response first by chance


def cautions(config: Config, plan: Plan) -> list[str]:
    """All that applies to the plan's data, in the order in which it would be met."""
    return [
        *([plan.not_imported()] if plan.imported and len(plan.missing) else []),
        *_left_out(config, plan),
        *_held_out(config, plan),
        *_contradictions(plan),
        *_one_sided(plan),
        *_imbalance(config, plan),
        *_control_tokens(config, plan),
        *_dated(config, plan),
    ]


def warnings_of(config: Config, plan: Plan) -> list[str]:
    """The same as lines of a plan."""
    return [f"warning   {caution}" for caution in cautions(config, plan)]


def length_that_keeps(lengths: np.ndarray, share: float) -> int:
    """The least multiple of 8 that `share` of the lengths do not exceed."""
    return 8 * math.ceil(float(np.quantile(lengths, share, method="higher")) / 8)


def _left_out(config: Config, plan: Plan) -> list[str]:
    pairs = plan.pairs
    read = pairs.read
    # many responses to one prompt are no fault if prompts are read alone
    drops = {name: drop.count for name, drop in pairs.drops.items() if plan.data != "prompts" or name != "duplicate"}
    dropped = sum(drops.values())
    if dropped <= _MANY_DROPPED * read:
        return []
    reason = next(iter(drops))
    said = f"{dropped} of {read} rows ({dropped / read:.0%}) are left out, most as {reason}"
    if reason not in ("too_long", "prompt_too_long"):
        return [f"{said}: 'refscore validate' shows them, dropped.parquet lists them all"]
    wanted = length_that_keeps(np.concatenate([pairs.sequences_longest, _too_long(plan)]), _KEPT)
    positions = position_limit(plan.reference.paths.base)
    if positions is not None and wanted > positions:
        cut = "" if config.data.too_long == "truncate_response" else ", or data.too_long=truncate_response"
        return [
            f"{said}: {_KEPT:.0%} would need {wanted} tokens, and the model reads {positions}: take another model{cut}"
        ]
    return [f"{said}: data.max_length={wanted} would keep {_KEPT:.0%}"]


def _too_long(plan: Plan) -> np.ndarray:
    rows = plan.pairs.dropped_table().select(["reason", "detail"]).to_pylist()
    found = [re.match(r"(\d+) tokens", row["detail"]) for row in rows if row["reason"].endswith("too_long")]
    return np.asarray([int(match[1]) for match in found if match], np.int64)


def _held_out(config: Config, plan: Plan) -> list[str]:
    held_out, train = (plan.pairs.splits.get(split, 0) for split in ("eval", "train"))
    units = UNITS[plan.data]
    if held_out >= ENOUGH_HELD_OUT:
        return []
    few = f"only {held_out} {units} are" if held_out else f"no {units[:-1]} is"
    consequence = (
        "intervals will be wide"
        if held_out
        else "the training shows no held-out figures, and 'refscore eval' will have nothing to judge"
    )
    if config.data.eval_path:
        return [f"{few} held out, so {consequence}: give data.eval_path more"]
    share = math.ceil(100 * 1.25 * ENOUGH_HELD_OUT / (held_out + train)) / 100
    if share > 0.5:
        return [
            f"{few} held out, so {consequence}; {held_out + train} {units} are too few to hold {ENOUGH_HELD_OUT} out"
        ]
    share = max(0.1, share)
    about = f"data.eval_fraction={share:g} would hold about {round(share * (held_out + train))} out"
    return [f"{few} held out, so {consequence}: {about}, or give data.eval_path"]


def _contradictions(plan: Plan) -> list[str]:
    """Pairs of the same two responses, each of which is once the chosen one; and rows that say the same twice."""
    said = []
    pairs = plan.pairs
    read = pairs.read
    twice = pairs.drops["duplicate"].count if "duplicate" in pairs.drops else 0
    if plan.data == "prompts":
        return []
    if twice:
        said.append(f"{twice} of {read} rows ({twice / read:.0%}) say what another row says, and are read once")
    # 64 bits of each key
    buffer = plan.keys.buffers()[1]
    words = np.frombuffer(buffer, "<u8").reshape(-1, 4)[plan.keys.offset :][: len(plan.keys), 0]
    if plan.data != "pairs":
        return [*said, *_both_labels(plan, words)]
    opposite = _opposite(words[::2], words[1::2])
    if len(opposite):
        rows = ", ".join(map(str, pairs.source_rows()[opposite[:2]]))
        said.append(
            f"{len(opposite)} pairs contradict one another: the same two responses, the other one chosen (rows {rows}). "
            "Nothing can be learned from them: remove one of each"
        )
    return said


def _opposite(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """Numbers of the pairs that stand among the pairs the other way round too."""
    # whichever is chosen, the sum is the same: the few whose sum stands twice are compared
    sums = chosen + rejected
    ordered = np.sort(sums)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(twice):
        return np.empty(0, np.int64)
    places = np.searchsorted(twice, sums)
    some = np.flatnonzero(twice[np.minimum(places, len(twice) - 1)] == sums)
    chosen, rejected = chosen[some], rejected[some]
    found: np.ndarray = some[np.isin(chosen * np.uint64(3) + rejected, rejected * np.uint64(3) + chosen)]
    return found


def _both_labels(plan: Plan, words: np.ndarray) -> list[str]:
    """Responses that one row calls good and another bad; `words` stand for the sequences."""
    if plan.data != "responses":
        return []
    labels = [label for _, table in plan.pairs.groups(["label"]) for label in table["label"].to_pylist()]
    good, bad = (words[[label is wanted for label in labels]] for wanted in (True, False))
    if not (both := len(np.intersect1d(good, bad))):
        return []
    return [
        f"{both} responses to the same prompt are called good in one row and bad in another: their sum teaches nothing"
    ]


def _imbalance(config: Config, plan: Plan) -> list[str]:
    """What is said of good against bad responses, each by its weight."""
    if plan.data != "responses":
        return []
    good, bad = plan.pairs.labels.get("train", [0, 0])
    if not good or not bad:
        return [
            f"all {good + bad} responses to train on are {'good' if good else 'bad'}: the loss learns from the difference"
        ]
    desirable, undesirable = config.train.desirable_weight, config.train.undesirable_weight
    ratio = desirable * good / (undesirable * bad)
    low, high = _BALANCED
    if low <= ratio <= high:
        return []
    weight = undesirable * (low if ratio < low else high) * bad / good
    said = f"{good} responses are good and {bad} bad, which count {ratio:.2f} to 1"
    return [
        f"{said}; KTO's authors (2402.01306) advise {low:g} to {high:.2f}: train.desirable_weight={weight:.2f} would do"
    ]


def _one_sided(plan: Plan) -> list[str]:
    if plan.data != "pairs":
        return []
    lengths = plan.pairs.response_tokens.reshape(-1, 2)
    if len(lengths) < _SOME_PAIRS:
        return []
    means = lengths.mean(0)
    for side, other, share in (
        ("chosen", "rejected", (lengths[:, 0] > lengths[:, 1]).mean()),
        ("rejected", "chosen", (lengths[:, 1] > lengths[:, 0]).mean()),
    ):
        if share > _ONE_SIDED:
            longer, shorter = sorted(means, reverse=True)
            often = f"in {share:.0%} of the pairs (on average {longer:.0f} and {shorter:.0f} tokens)"
            habit = "long" if side == "chosen" else "short"
            said = f"{side} is longer than {other} {often}: a policy learns from that to write {habit} responses"
            # sums do not say what part of them goes beyond the shorter response
            if not plan.held_as_sums:
                said += "; train.ld_alpha=0.5 gives half the weight to what goes beyond the shorter response"
            return [said]
    return []


def _control_tokens(config: Config, plan: Plan) -> list[str]:
    held = {
        "text": "they are encoded as the text they are; data.special_tokens=parse would let them act",
        "parse": "they act, so a text can end a turn or begin one; data.special_tokens=text encodes them as text",
    }
    named = ", ".join(f"{token} in {count}" for token, count in plan.pairs.control.items())
    return (
        [f"rows name control tokens of the model in their text ({named}): {held[config.data.special_tokens]}"]
        if named
        else []
    )


def _dated(config: Config, plan: Plan) -> list[str]:
    """What is said of a template that writes the day into prompts, as that of Llama 3.2 does."""
    template = plan.reference.tokenizer.chat_template if config.data.template == "chat" else None
    if DAY not in str(template):
        return []
    said = f"the chat template writes the day into prompts ({DAY}), so what is scored today is not found tomorrow"
    return [f"{said}: copy the model's folder and write a fixed day into the chat template there"]
