"""Names of the preference losses, and which settings go together with them. The losses themselves: `pipeline.training.losses`."""

from __future__ import annotations

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
]
REFERENCE_FREE = frozenset({"sft", "simpo", "cpo", "orpo"})
ACROSS_PAIRS = frozenset({"aot", "aot_unpaired"})
_SMOOTHED = frozenset({"sigmoid", "robust", "exo_pair", "aot", "aot_unpaired", "simpo", "cpo"})
_WITH_F_DIVERGENCE = frozenset(
    {"sigmoid", "robust", "hinge", "ipo", "ipo_sum", "exo_pair", "discopop", "sigmoid_norm", "sft"}
)
_PREFERENCE_ONLY = {
    "loss_type", "loss_weights", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "ld_alpha",
    "use_weighting", "discopop_tau", "simpo_gamma", "cpo_alpha",
}  # fmt: skip


def reference_free(train: Any) -> bool:
    """Whether nothing that a `train` section asks for compares with the reference, so that nothing need be scored."""
    return train.objective == "reward" or set(train.loss_type) <= REFERENCE_FREE


def across_pairs(train: Any) -> bool:
    """Whether a pair's loss depends on the other pairs of its step."""
    return train.objective == "preference" and bool(set(train.loss_type) & ACROSS_PAIRS)


def loss_problems(train: Any, changed: set[str]) -> list[str]:
    """What is wrong with the loss fields of a `train` section: combinations without sense, settings that nothing would read.

    `changed` are the fields that differ from their defaults. One sentence each.
    """
    names = set(train.loss_type)
    if train.objective == "reward":
        unread = ", ".join(sorted(changed & _PREFERENCE_ONLY))
        return [f"objective reward trains a reward model and does not read {unread}"] if unread else []
    problems = []
    if len(names) < len(train.loss_type):
        problems.append(f"loss_type {train.loss_type} names a loss twice: give it a weight in loss_weights")
    if train.loss_weights is not None and len(train.loss_weights) != len(train.loss_type):
        problems.append(f"{len(train.loss_weights)} loss_weights for {len(train.loss_type)} losses")
    if train.label_smoothing and not names & _SMOOTHED:
        problems.append(f"label_smoothing is read by {', '.join(sorted(_SMOOTHED))}, not by {', '.join(sorted(names))}")
    if "exo_pair" in names and not train.label_smoothing:
        problems.append("exo_pair takes the logarithm of label_smoothing: set it, to 0.001 for instance")
    if train.f_divergence_type != "reverse_kl" and (unfit := names - _WITH_F_DIVERGENCE):
        problems.append(f"f_divergence_type {train.f_divergence_type} has no meaning for {', '.join(sorted(unfit))}")
    if train.f_divergence_type != "reverse_kl" and names <= REFERENCE_FREE:
        problems.append(f"f_divergence_type {train.f_divergence_type} needs a loss that compares with the reference")
    if "f_alpha_divergence_coef" in changed and train.f_divergence_type != "alpha_divergence":
        problems.append("f_alpha_divergence_coef is read with f_divergence_type alpha_divergence only")
    if train.ld_alpha is not None and names <= REFERENCE_FREE:
        problems.append("ld_alpha changes what is compared with the reference; these losses compare nothing with it")
    if train.use_weighting and names & ACROSS_PAIRS:
        problems.append("use_weighting weighs pairs, but the AOT losses sort pairs away")
    for field, loss in (("discopop_tau", "discopop"), ("simpo_gamma", "simpo"), ("cpo_alpha", "cpo")):
        if field in changed and loss not in names:
            problems.append(f"{field} is read by loss_type {loss} only")
    return problems
