"""Combinations of loss settings without sense are refused with the reason; every loss has a formula."""

import pytest

from pipeline.config.files import load_overrides
from pipeline.config.losses import LOSS_FACTS, LossType
from pipeline.config.training import TrainConfig
from pipeline.errors import ConfigError
from pipeline.training.objectives.losses import LOSSES


def test_every_name_has_a_loss_and_every_loss_a_source():
    of_pairs = {name for name, facts in LOSS_FACTS.items() if facts.data == "pairs"}
    assert set(LossType.__args__) == set(LOSS_FACTS)
    assert of_pairs == set(LOSSES)
    for name, loss in LOSSES.items():
        assert "20" in loss.__doc__, name
        assert (
            "equation" in loss.__doc__
            or name in ("hinge", "nca_pair", "bco_pair", "aot", "aot_unpaired", "sft")
            or name.startswith("rpo")
        )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss_type": "exo_pair"}, "exo_pair takes the logarithm of label_smoothing"),
        ({"loss_type": ["sigmoid", "sigmoid"]}, "twice"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "1 loss_weights for 2 losses"),
        ({"loss_weights": [-1.0]}, "must not be negative"),
        ({"loss_weights": [0.0]}, "nor all be 0"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing is read by"),
        ({"loss_type": "nca_pair", "f_divergence_type": "forward_kl"}, "has no meaning for nca_pair"),
        ({"loss_type": "sft", "f_divergence_type": "forward_kl"}, "compares with the reference"),
        ({"f_alpha_divergence_coef": 0.7}, "read with f_divergence_type alpha_divergence only"),
        ({"loss_type": "simpo", "ld_alpha": 0.5}, "ld_alpha"),
        ({"loss_type": "aot", "use_weighting": True}, "AOT"),
        ({"discopop_tau": 0.1}, "read by loss_type discopop only"),
        ({"simpo_gamma": 0.1}, "read by loss_type simpo only"),
        ({"cpo_alpha": 0.1}, "read by loss_type cpo only"),
        ({"objective": "reward", "loss_type": "ipo"}, "does not read loss_type"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(settings, words):
    with pytest.raises(ConfigError, match=words):
        load_overrides({"data": {"path": "x"}, "train": settings}, ())


def test_all_problems_are_said_at_once():
    with pytest.raises(ConfigError) as refused:
        load_overrides({"data": {"path": "x"}, "train": {"loss_type": "exo_pair", "cpo_alpha": 0.5}}, ())
    assert "exo_pair" in str(refused.value)
    assert "cpo_alpha" in str(refused.value)


def test_four_bits_need_adapters():
    with pytest.raises(ConfigError, match=r"needs policy\.lora"):
        load_overrides({"data": {"path": "x"}, "policy": {"load_in_4bit": True}}, ())


def test_one_loss_or_a_list():
    assert TrainConfig(loss_type="ipo").loss_type == ["ipo"]
    assert TrainConfig(loss_type=["ipo", "sft"]).loss_type == ["ipo", "sft"]
