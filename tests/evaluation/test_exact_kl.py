"""The exact KL by position against plain float64 forward passes of whole sequences."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.engines.protocol import Request
from pipeline.errors import ConfigError
from pipeline.evaluation import exact_kl
from pipeline.evaluation.candidates import Candidate
from pipeline.evaluation.exact_kl import exact_divergence, position_divergence
from pipeline.forward.output_layer import OutputLayer
from pipeline.models.load import Named
from tests.conftest import make_tiny_model

REQUESTS = [
    Request([5, 6, 7], [8, 9, 10, 11]),
    Request([4, 3], [9]),
    Request([5, 6, 7], [8, 9, 2]),
    Request([5, 6, 7], [8, 9, 10, 11]),  # the same sample twice
    Request(list(range(3, 40)), list(range(20, 60))),
]


def candidate(name: str, directory: Path) -> Candidate:
    return Candidate(name, directory, Named(str(directory)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    where = tmp_path_factory.mktemp("models")
    first, second = (make_tiny_model(where / name, seed) for name, seed in (("one", 1), ("two", 2)))
    return candidate("policy", first), candidate("reference", second)


def dense(model: Candidate, request: Request) -> torch.Tensor:
    """Log-probabilities [tokens, V] of every next token, in float64."""
    loaded = AutoModelForCausalLM.from_pretrained(model.base, dtype=torch.float64).eval()
    ids = torch.tensor([[*request.prompt_ids, *request.response_ids]])
    with torch.no_grad():
        logits = loaded(ids).logits[0, len(request.prompt_ids) - 1 : -1]
    return logits.log_softmax(1)


@pytest.mark.parametrize("rows_at_once", [1, 1000])
def test_it_is_the_divergence_of_dense_distributions(models, rows_at_once, monkeypatch):
    policy, reference = models
    vocabulary = dense(policy, REQUESTS[0]).shape[1]
    monkeypatch.setattr(exact_kl, "LOGITS_BYTES", 4 * vocabulary * rows_at_once)
    found = exact_divergence(policy, reference, REQUESTS, "float32")
    for values, request in zip(found, REQUESTS, strict=True):
        p, q = dense(policy, request), dense(reference, request)
        exact = (p.exp() * (p - q)).sum(1).numpy()
        assert values.dtype == np.float32
        assert exact.min() > 1e-3
        assert values == pytest.approx(exact, rel=2e-4)
    # which one is the policy matters
    assert found[0] != pytest.approx(exact_divergence(reference, policy, REQUESTS[:1], "float32")[0], rel=1e-3)


def test_of_a_model_with_itself_it_is_nothing(models):
    found = exact_divergence(models[0], models[0], REQUESTS, "float32")
    assert max(np.abs(values).max() for values in found) < 1e-6


def test_small_batches_change_nothing(models, monkeypatch):
    whole = exact_divergence(*models, REQUESTS, "float32")
    monkeypatch.setattr(exact_kl, "TOKENS_PER_BATCH", {"cpu": 8, "cuda": 8})
    for values, other in zip(exact_divergence(*models, REQUESTS, "float32"), whole, strict=True):
        assert values == pytest.approx(other, rel=1e-4)


def test_vocabularies_of_other_sizes_are_refused(models, tmp_path):
    vocabulary = dense(models[0], REQUESTS[0]).shape[1]
    wider = candidate("wider", make_tiny_model(tmp_path / "wider", vocab_size=vocabulary + 64))
    with pytest.raises(ConfigError, match=f"have {vocabulary} and {vocabulary + 64} tokens"):
        exact_divergence(models[0], wider, REQUESTS, "float32")


def test_far_apart_distributions_stay_finite_and_near_ones_are_not_negative():
    identity = torch.eye(3)
    layer = OutputLayer(torch.nn.Parameter(identity), None, 1.0, None)
    far = position_divergence(torch.tensor([[200.0, 0, 0]]), layer, torch.tensor([[0.0, 200, 0]]), layer)
    assert far.detach().tolist() == [pytest.approx(200.0)]
    states = torch.randn(500, 3, generator=torch.manual_seed(0))
    near = position_divergence(states, layer, states + 1e-4 * torch.randn(500, 3), layer)
    assert near.detach().min() > -1e-7
