"""Preference losses by name: one row of facts per loss, and which settings go together with them.

Their formulas stand in `pipeline.training.objectives.losses`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

LossType = Literal[
    "sigmoid",
    "robust",
    "hinge",
    "ipo",
    "ipo_sum",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
    "sft",
    "simpo",
    "cpo",
    "orpo",
    "rpo_sq",
    "rpo_bwd_kl",
    "rpo_fwd_kl",
    "kto",
    "bco",
    "plackett_luce",
]
# what a training learns from: pairs, single responses with a label, lists of responses in order, or prompts, of which samples are
# made
Data = Literal["pairs", "responses", "lists", "prompts"]


@dataclass(frozen=True)
class LossFacts:
    """What a loss reads and fits with; its formula stands in `pipeline.training.objectives.losses` under the same name.

    `compares`: with the reference; if not, `reward` says of what of the policy's log-probabilities it makes one, their sum or
    their mean. `across_pairs`: a pair's loss depends on the others of its step. `smoothed`: reads label_smoothing.
    `f_divergence`: has a meaning for divergences but the reverse KL. `setting`: a field that it alone reads. `data`: what it
    learns from; `mismatched`: it also reads the response to another prompt; `margins`: it reads how much better chosen is.
    """

    compares: bool = True
    across_pairs: bool = False
    smoothed: bool = False
    f_divergence: bool = False
    setting: str = ""
    reward: Literal["ratio", "sum", "mean"] = "ratio"
    data: Data = "pairs"
    mismatched: bool = False
    margins: bool = False


LOSS_FACTS: dict[str, LossFacts] = {
    "sigmoid": LossFacts(smoothed=True, f_divergence=True),
    "robust": LossFacts(smoothed=True, f_divergence=True),
    "hinge": LossFacts(f_divergence=True),
    "ipo": LossFacts(f_divergence=True),
    "ipo_sum": LossFacts(f_divergence=True),
    "exo_pair": LossFacts(smoothed=True, f_divergence=True),
    "nca_pair": LossFacts(),
    "bco_pair": LossFacts(),
    "sppo_hard": LossFacts(),
    "aot": LossFacts(smoothed=True, across_pairs=True),
    "aot_unpaired": LossFacts(smoothed=True, across_pairs=True),
    "apo_zero": LossFacts(),
    "apo_down": LossFacts(),
    "discopop": LossFacts(f_divergence=True, setting="discopop_tau"),
    "sigmoid_norm": LossFacts(f_divergence=True),
    "sft": LossFacts(compares=False, f_divergence=True, reward="sum"),
    "simpo": LossFacts(compares=False, smoothed=True, setting="simpo_gamma", reward="mean"),
    "cpo": LossFacts(compares=False, smoothed=True, setting="cpo_alpha", reward="sum"),
    "orpo": LossFacts(compares=False, reward="mean"),
    "rpo_sq": LossFacts(setting="rpo_eta", margins=True),
    "rpo_bwd_kl": LossFacts(setting="rpo_eta", margins=True),
    "rpo_fwd_kl": LossFacts(setting="rpo_eta", margins=True),
    "kto": LossFacts(data="responses", mismatched=True),
    "bco": LossFacts(data="responses"),
    "plackett_luce": LossFacts(data="lists"),
}
# read by losses of labelled responses alone
_OF_LABELS = {"desirable_weight", "undesirable_weight"}
# what only pairs have two sides or one token's weight for
_OF_PAIRS = {"ld_alpha", "use_weighting", "f_divergence_type", "label_smoothing"}
_PREFERENCE_ONLY = {
    "loss_type", "loss_weights", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "ld_alpha",
    "use_weighting", *(facts.setting for facts in LOSS_FACTS.values() if facts.setting), *_OF_LABELS,
}  # fmt: skip


def reference_free(train: Any) -> bool:
    """Whether nothing that a `train` section asks of pairs compares with the reference, so that none need be scored."""
    return train.objective != "preference" or not any(LOSS_FACTS[name].compares for name in train.loss_type)


def data_of(train: Any) -> Data:
    """What a `train` section learns from: pairs unless its losses say otherwise, which all say the same, or prompts."""
    if train.on_samples:
        return "prompts"
    return LOSS_FACTS[train.loss_type[0]].data if train.objective == "preference" else "pairs"


def mismatched(train: Any) -> bool:
    """Whether a `train` section needs, beside every response, the response to another prompt."""
    return train.objective == "preference" and any(LOSS_FACTS[name].mismatched for name in train.loss_type)


def margins(train: Any) -> list[str]:
    """The losses of a `train` section that read how much better chosen is than rejected."""
    if train.objective == "reward":
        return ["a reward model with train.margin_scale"] if train.margin_scale else []
    return [name for name in train.loss_type if train.objective == "preference" and LOSS_FACTS[name].margins]


def sums_do_not_do(what: str) -> str:
    """Why `train.ld_alpha` cannot be used with `what`, and what can."""
    return (
        f"{what} are sums of responses, without values per token, and train.ld_alpha weighs tokens: leave it out, or import "
        "scores that have values per token under another name (JSONL has them)"
    )


def across_pairs(train: Any) -> bool:
    """Whether a pair's loss depends on the other pairs of its step."""
    return train.objective == "preference" and any(LOSS_FACTS[name].across_pairs for name in train.loss_type)


def loss_problems(train: Any, changed: set[str]) -> list[str]:
    """What is wrong with the loss fields of a `train` section: combinations without sense, settings that nothing would read.

    `changed` are the fields that differ from their defaults. One sentence each.
    """
    names = set(train.loss_type)
    compares = any(LOSS_FACTS[name].compares for name in names)
    problems = []
    if not train.on_samples and "policy_gradient" in changed:
        problems.append(
            "policy_gradient is read with objective=policy_gradient only, and objective=value for its rewards"
        )
    if train.objective != "preference":
        learns = {
            "reward": "trains a reward model",
            "policy_gradient": "learns from samples",
            "value": "trains a value model",
        }[train.objective]
        unread = ", ".join(sorted(changed & _PREFERENCE_ONLY))
        return problems + ([f"objective {train.objective} {learns} and does not read {unread}"] if unread else [])
    if len(names) < len(train.loss_type):
        problems.append(f"loss_type {train.loss_type} names a loss twice: give it a weight in loss_weights")
    if len({LOSS_FACTS[name].data for name in names}) > 1:
        learn = {"pairs": "pairs", "responses": "single responses", "lists": "ranked lists"}
        said = ", ".join(f"{name} from {learn[LOSS_FACTS[name].data]}" for name in train.loss_type)
        problems.append(
            f"losses that learn from different data cannot be mixed ({said}): train.loss_type needs one kind"
        )
    if train.loss_weights is not None and len(train.loss_weights) != len(train.loss_type):
        problems.append(f"{len(train.loss_weights)} loss_weights for {len(train.loss_type)} losses")
    smoothed = {name for name, facts in LOSS_FACTS.items() if facts.smoothed}
    if train.label_smoothing and not names & smoothed:
        problems.append(f"label_smoothing is read by {', '.join(sorted(smoothed))}, not by {', '.join(sorted(names))}")
    if "exo_pair" in names and not train.label_smoothing:
        problems.append("exo_pair takes the logarithm of label_smoothing: set it, to 0.001 for instance")
    if train.f_divergence_type != "reverse_kl" and (
        unfit := {name for name in names if not LOSS_FACTS[name].f_divergence}
    ):
        problems.append(f"f_divergence_type {train.f_divergence_type} has no meaning for {', '.join(sorted(unfit))}")
    if train.f_divergence_type != "reverse_kl" and not compares:
        problems.append(f"f_divergence_type {train.f_divergence_type} needs a loss that compares with the reference")
    if "f_alpha_divergence_coef" in changed and train.f_divergence_type != "alpha_divergence":
        problems.append("f_alpha_divergence_coef is read with f_divergence_type alpha_divergence only")
    if train.ld_alpha is not None and not compares:
        problems.append("ld_alpha changes what is compared with the reference; these losses compare nothing with it")
    if train.use_weighting and any(LOSS_FACTS[name].across_pairs for name in names):
        problems.append("use_weighting weighs pairs, but the AOT losses sort pairs away")
    readers: dict[str, list[str]] = {name: ["kto", "bco"] for name in sorted(_OF_LABELS)}
    for loss, facts in LOSS_FACTS.items():
        if facts.setting:
            readers.setdefault(facts.setting, []).append(loss)
    problems += [
        f"{setting} is read by loss_type {', '.join(losses)} only"
        for setting, losses in readers.items()
        if setting in changed and not names & set(losses)
    ]
    if data_of(train) != "pairs" and (of_pairs := changed & _OF_PAIRS):
        problems.append(
            f"{', '.join(sorted(of_pairs))} is about pairs, and {', '.join(sorted(names))} learns from none"
        )
    if "margin_scale" in changed:
        problems.append("margin_scale is read with objective=reward only")
    return problems
