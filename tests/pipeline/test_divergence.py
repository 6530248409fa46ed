"""Both estimates of KL(policy || reference) against the sum over every response that there can be."""

import itertools

import numpy as np
import pyarrow as pa
import pytest

from pipeline.divergence import divergence
from pipeline.schema import KL


def table(rows):
    filled = [
        {"prompt_id": f"{number}", "sample": 0, "model": "policy", "topic": "", "prompt": "", "response": "",
         "response_ids": [], "finish_reason": "stop", "tokens": len(own), "logps": own, "ref_logps": ref,
         "logp": sum(own), "ref_logp": sum(ref)}
        for number, (own, ref) in enumerate(rows)
    ]  # fmt: skip
    return pa.Table.from_pylist(filled, schema=KL)


@pytest.mark.parametrize("seed", range(4))
def test_the_expectation_of_both_estimates_is_the_divergence(seed):
    """Responses of two tokens from three, each as often as the policy samples it."""
    draw = np.random.default_rng(seed)
    policy, reference = draw.dirichlet([4, 4, 4], size=2), draw.dirichlet([4, 4, 4], size=2)
    counted = {"kl": 0.0, "low_variance": 0.0}
    for tokens in itertools.product(range(3), repeat=2):
        own = [float(np.log(policy[at, token])) for at, token in enumerate(tokens)]
        ref = [float(np.log(reference[at, token])) for at, token in enumerate(tokens)]
        figures = divergence(table([(own, ref)]))
        for name in counted:
            counted[name] += float(np.exp(sum(own))) * figures[name]["mean"]
        # of every single response it is never negative
        assert figures["low_variance"]["mean"] >= 0
    truth = float((policy * np.log(policy / reference)).sum())
    assert counted["kl"] == pytest.approx(truth, abs=1e-6)
    assert counted["low_variance"] == pytest.approx(truth, abs=1e-6)


def test_by_hand():
    figures = divergence(table([([-1.0, -2.0], [-1.5, -1.0]), ([-0.5], [-2.0])]))
    # log-ratios 0.5 and -1 of the one response, 1.5 of the other
    assert figures["kl"]["mean"] == pytest.approx((-0.5 + 1.5) / 2)
    second = [np.exp(-0.5) - 1 + 0.5 + np.exp(1.0) - 1 - 1, np.exp(-1.5) - 1 + 1.5]
    assert figures["low_variance"]["mean"] == pytest.approx(np.mean(second), abs=1e-6)
    assert figures["per_token"] == pytest.approx(1.0 / 3)
    assert (figures["responses"], figures["tokens"]) == (2, 3)
