"""KL's figures against hand values, and both estimates against the divergence of distributions known whole."""

import math

import numpy as np
import pytest

from pipeline.artifacts.schemas import KL
from pipeline.config.experiment import GenerateConfig, ReferenceConfig
from pipeline.evaluation.kl import divergence, kl_table, on_policy, perplexity
from pipeline.evaluation.results import CONTROL_VARIATE, END, EXACT, SAMPLED, Position


def table(*rows):
    """kl.parquet's rows from (prompt, the policy's logps, the reference's logps)."""
    import pyarrow as pa

    found = [{"prompt_id": prompt, "logps": own, "ref_logps": ref} for prompt, own, ref in rows]
    return pa.Table.from_pylist(
        found, schema=pa.schema([KL.field(name) for name in ("prompt_id", "logps", "ref_logps")])
    )


def test_figures_by_hand():
    # gaps: 1 and -0.5; 2; 0.25. Sums of the responses: 0.5 and 2 for prompt a, 0.25 for prompt b
    figures = divergence(table(("a", [-1, -2], [-2, -1.5]), ("a", [-1], [-3]), ("b", [-0.5], [-0.75])))
    assert figures.kl.mean == pytest.approx((1.25 + 0.25) / 2)
    assert figures.per_token == pytest.approx(2.75 / 4)
    assert (figures.responses, figures.tokens) == (3, 4)

    def estimate(gap):  # r - 1 - log r with r = pi_ref / pi = e^-gap
        return math.exp(-gap) - 1 + gap

    of_a = (estimate(1) + estimate(-0.5) + estimate(2)) / 2
    of_b = estimate(0.25)
    controlled = figures.estimates[CONTROL_VARIATE]
    assert controlled.interval.mean == pytest.approx((of_a + of_b) / 2)
    # two prompts: the standard deviation is their distance by the square root of 2
    assert controlled.standard_error == pytest.approx(abs(of_a - of_b) / 2)
    assert controlled.variance_ratio == pytest.approx(((1.25 - 0.25) / (of_a - of_b)) ** 2)
    assert figures.estimates[SAMPLED].interval == figures.kl
    assert figures.estimates[SAMPLED].standard_error == pytest.approx(0.5)
    assert figures.estimates[SAMPLED].variance_ratio == 1
    assert EXACT not in figures.estimates
    assert figures.kl.low < figures.kl.mean < figures.kl.high


def test_nats_per_token_of_no_token_and_of_one():
    assert divergence(table(("a", [], []))).per_token == 0
    assert divergence(table(("a", [-1], [-3]))).per_token == 2


def test_both_estimates_reach_the_divergence_of_known_distributions():
    policy, reference = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    # every outcome as often as the policy samples it: the means are exact
    drawn = np.repeat([0, 1, 2], [5, 3, 2])
    rows = [(str(at), [math.log(policy[one])], [math.log(reference[one])]) for at, one in enumerate(drawn)]
    figures = divergence(table(*rows))
    exact = float((policy * np.log(policy / reference)).sum())
    assert figures.kl.mean == pytest.approx(exact, abs=1e-6)
    assert figures.estimates[CONTROL_VARIATE].interval.mean == pytest.approx(exact, abs=1e-6)
    assert figures.estimates[CONTROL_VARIATE].interval.low >= 0


def test_the_end_token_stands_apart_and_parts_add_up_to_the_whole():
    import pyarrow as pa

    # gaps of 1 at every position, of 5 at the end; the second response was cut off, so its last token is no end
    rows = [
        {
            "prompt_id": "a",
            "logps": [0.0] * 11,
            "ref_logps": [-1.0] * 10 + [-5.0],
            "finish_reason": "stop",
            "exact_kl": [0.5] * 11,
        },
        {
            "prompt_id": "a",
            "logps": [0.0] * 2,
            "ref_logps": [-1.0, -5.0],
            "finish_reason": "length",
            "exact_kl": [0.5] * 2,
        },
        {
            "prompt_id": "b",
            "logps": [0.0] * 17,
            "ref_logps": [-1.0] * 16 + [-5.0],
            "finish_reason": "stop",
            "exact_kl": [0.5] * 17,
        },
    ]
    names = ("prompt_id", "logps", "ref_logps", "finish_reason", "exact_kl")
    figures = divergence(pa.Table.from_pylist(rows, schema=pa.schema([KL.field(name) for name in names])))
    assert figures.positions == [
        Position("1 to 8", 18, ((8 + 6) / 2 + 8) / 2, (10 * 0.5 / 2 + 4) / 2),
        Position("9 to 16", 10, (2 / 2 + 8) / 2, (1 / 2 + 4) / 2),
        Position(END, 2, (5 / 2 + 5) / 2, (0.5 / 2 + 0.5) / 2),
    ]
    assert sum(part.sampled for part in figures.positions) == pytest.approx(figures.kl.mean)
    exact = figures.estimates[EXACT]
    assert sum(part.exact for part in figures.positions) == pytest.approx(exact.interval.mean)
    assert exact.interval.mean == pytest.approx((6.5 / 2 + 8.5) / 2)
    assert exact.variance_ratio == pytest.approx(((10.5 - 21) / (3.25 - 8.5)) ** 2)
    # known for some responses only: not known
    rows[0]["exact_kl"] = None
    figures = divergence(pa.Table.from_pylist(rows, schema=pa.schema([KL.field(name) for name in names])))
    assert EXACT not in figures.estimates
    assert {part.exact for part in figures.positions} == {None}


def test_the_exact_estimate_has_the_sampled_ones_mean_and_less_variance():
    """A model of two tokens that depend on each other, every response as often as it is sampled."""
    import pyarrow as pa

    first, ref_first = np.array([0.75, 0.25]), np.array([0.5, 0.5])
    second, ref_second = np.array([[0.5, 0.5], [0.25, 0.75]]), np.array([[0.75, 0.25], [0.5, 0.5]])

    def exact(p, q):
        return float((p * np.log(p / q)).sum())

    rows = []
    for a in range(2):
        for b in range(2):
            rows += [
                {
                    "logps": [np.log(first[a]), np.log(second[a, b])],
                    "ref_logps": [np.log(ref_first[a]), np.log(ref_second[a, b])],
                    "exact_kl": [exact(first, ref_first), exact(second[a], ref_second[a])],
                }
            ] * round(16 * first[a] * second[a, b])
    rows = [{"prompt_id": str(number), **row} for number, row in enumerate(rows)]
    names = ("prompt_id", "logps", "ref_logps", "exact_kl")
    figures = divergence(pa.Table.from_pylist(rows, schema=pa.schema([KL.field(name) for name in names])))
    joint, ref_joint = first[:, None] * second, ref_first[:, None] * ref_second
    whole = float((joint * np.log(joint / ref_joint)).sum())
    for estimate in figures.estimates.values():
        assert estimate.interval.mean == pytest.approx(whole, abs=1e-6)
    assert figures.estimates[EXACT].variance_ratio > 3
    assert figures.estimates[EXACT].standard_error < figures.estimates[SAMPLED].standard_error


def test_the_table_holds_both_scores_and_their_sums():
    samples = table(("a", None, None), ("b", None, None))
    own, ref = [np.float32([-1, -2]), np.float32([-3])], [np.float32([-0.5, -1]), np.float32([-4])]
    rows = kl_table(samples, own, ref).to_pylist()
    assert [row["logps"] for row in rows] == [[-1, -2], [-3]]
    assert [row["ref_logps"] for row in rows] == [[-0.5, -1], [-4]]
    assert [(row["logp"], row["ref_logp"]) for row in rows] == [(-3, -1.5), (-3, -4)]
    for missing in ((None, ref), (own, None)):
        assert [row["logp"] for row in kl_table(samples, *missing).to_pylist()] == [None, None]
    with pytest.raises(ValueError):
        kl_table(samples, own[:1], ref)
    with pytest.raises(ValueError):
        kl_table(samples, own, ref[:1])


def test_it_is_sampled_whole_at_temperature_one_in_the_dtype_that_scores():
    settings = on_policy(GenerateConfig(temperature=0.3, top_p=0.5, kl_samples=3, fixed_length=True), "float32")
    assert not settings.fixed_length
    assert (settings.temperature, settings.top_p, settings.samples, settings.dtype) == (1.0, 1.0, 3, "float32")


def test_sums_and_columns_are_as_wide_as_declared():
    samples = table(("a", None, None))
    own = [np.full(1000, -0.1, dtype=np.float32)]
    found = kl_table(samples, own, own)
    assert found.schema == kl_table(samples, None, None).schema == KL
    exact = math.fsum(map(float, own[0]))
    assert found["logp"].to_pylist() == found["ref_logp"].to_pylist() == [pytest.approx(exact, rel=1e-12)]


def test_responses_are_scored_after_their_own_prompts(monkeypatch, tmp_path):
    import pyarrow as pa

    from pipeline.engines.reference import OpenedReference
    from pipeline.evaluation import kl as module
    from pipeline.judges.judging import Prompt
    from pipeline.models.locate import ReferencePaths
    from pipeline.store.identity import Numerics

    asked = []

    class Scorer:
        def __enter__(self):
            return self

        def __exit__(self, *stop):
            asked.append("stopped")

        def score(self, requests):
            asked.append([(list(one.prompt_ids), list(one.response_ids)) for one in requests])
            return iter([np.float32([-len(one.response_ids)]) for one in requests])

    def start(*arguments):
        asked.append(arguments)
        return Scorer()

    monkeypatch.setattr(module, "start_scorer", start)
    numerics = Numerics("vllm", "0", "cpu", "float32", "float32")
    reference = OpenedReference(ReferenceConfig(model="any"), ReferencePaths(tmp_path, None, tmp_path), numerics)
    samples = pa.table({"prompt_id": ["b", "a"], "response_ids": [[7, 8, 9], [6]]})
    prompts = [Prompt("a", "A", ids=[1]), Prompt("b", "B", ids=[2, 3])]
    logps = module.score_responses(reference, tmp_path, prompts, samples)
    assert [one.tolist() for one in logps] == [[-3], [-1]]
    given, requests, stopped = asked
    assert given == (reference.config, tmp_path, numerics, 5)
    assert requests == [([2, 3], [7, 8, 9]), ([1], [6])]
    assert stopped == "stopped"


def test_perplexity_is_of_the_tokens_under_the_reference():
    import pyarrow as pa

    def scored(*ref_logps):
        sums = [None if values is None else float(np.sum(values)) for values in ref_logps]
        return pa.table({"tokens": [2] * len(sums), "ref_logp": pa.array(sums, pa.float64())})

    assert perplexity(scored(np.log([0.5, 0.25]), np.log([0.5, 0.5]))) == pytest.approx(2 ** (5 / 4))
    assert perplexity(scored(np.log([0.5, 0.25]), None)) is None
