"""Which figures of a sample let an earlier reference's scores stand for today's, and whose scores may never."""

import dataclasses

import numpy as np
import pytest

from pipeline.errors import CheckError, ConfigError
from pipeline.models.identity import ModelIdentity
from pipeline.precompute.adoption import judged, limits, must_be_adoptable
from pipeline.precompute.agreement import agreement
from pipeline.store.adoption import Adoption
from pipeline.store.identity import imported_numerics
from tests.store.test_store import REFERENCE


def as_today(**numerics):
    return dataclasses.replace(REFERENCE, numerics=dataclasses.replace(REFERENCE.numerics, **numerics))


TODAY = as_today(engine_version="2")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tolerance_of_ones_own_is_of_the_mean_and_the_others_go_with_it(dtype):
    assert limits(dtype, 0.01) == {
        "mean_signed_difference": pytest.approx(0.002),
        "mean_absolute_difference": pytest.approx(0.01),
        "max_absolute_difference": pytest.approx(0.2),
    }


def test_what_each_dtype_may_differ_by():
    assert list(limits("float32").values()) == [0.001, 0.002, 0.001]
    assert list(limits("bfloat16").values()) == list(limits("float16").values()) == [0.02, 0.1, 2.0]


@pytest.mark.parametrize("differing", ["mean_signed_difference", "mean_absolute_difference", "max_absolute_difference"])
@pytest.mark.parametrize("value", [-1.0, 1.0, float("nan"), float("-inf")])
def test_each_figure_beyond_its_limit_alone_refuses(differing, value):
    tolerance = dict.fromkeys(limits("float32"), 0.5)
    figures = {**dict.fromkeys(tolerance, -0.5), differing: value}
    with pytest.raises(CheckError, match=f"not adopted.*{differing.replace('_', ' ')} .*allowed 0.5"):
        judged(REFERENCE, TODAY, figures, tolerance)
    adopted = judged(REFERENCE, TODAY, {**figures, differing: 0.5}, tolerance)
    assert Adoption.from_described(adopted.described()) == adopted


@pytest.mark.parametrize("tolerance", [0.0, 1e-9])
def test_with_no_tolerance_only_the_same_numbers_agree(tolerance):
    truth = [-np.random.default_rng(number).random(5, dtype=np.float32) for number in range(4)]
    judged(REFERENCE, TODAY, agreement(truth, truth, 0.1), limits("float32", tolerance))
    others = [*truth[:3], truth[3] - np.float32(1e-6)]
    with pytest.raises(CheckError, match="not adopted"):
        judged(REFERENCE, TODAY, agreement(others, truth, 0.1), limits("float32", tolerance))


@pytest.mark.parametrize(
    ("adopted", "by", "said"),
    [
        (TODAY, TODAY, "own reference"),
        (dataclasses.replace(TODAY, numerics=imported_numerics("a paper", "float32")), TODAY, "imported by 'a paper'"),
        (as_today(logps="fixed_point"), TODAY, "fixed point"),
        (dataclasses.replace(REFERENCE, model=ModelIdentity({"w": "01"}, {})), TODAY, "another model.*weights of w"),
        (dataclasses.replace(REFERENCE, model=ModelIdentity({"w": "00"}, {"rope": 1})), TODAY, "another model.*rope"),
        (
            dataclasses.replace(REFERENCE, model=ModelIdentity({"w": "00"}, {}, {"lora": "00"})),
            TODAY,
            "another model.*lora",
        ),
    ],
)
def test_what_may_never_stand_for_todays_scores(adopted, by, said):
    with pytest.raises(ConfigError, match=said):
        must_be_adoptable(adopted, by)


def test_what_may():
    for adopted in (REFERENCE, as_today(dtype="bfloat16"), as_today(engine="transformers"), as_today(device="cuda")):
        must_be_adoptable(adopted, TODAY)
    must_be_adoptable(TODAY, as_today(logps="fixed_point", dtype="bfloat16"))
    must_be_adoptable(as_today(logps="fixed_point"), as_today(logps="fixed_point", engine_version="2"))
