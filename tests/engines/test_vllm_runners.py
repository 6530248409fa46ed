"""The runners against engines that forget as vLLM's do: what the cache held is garbage or None, and never leaves.

The doubles stand in for the two model runners in this process: each answers with a number that only the very ids can give.
What vLLM itself answers is in test_vllm_scoring.py.
"""

import os
import random
from contextlib import nullcontext

import numpy as np
import pytest

from pipeline.engines.protocol import Request
from pipeline.engines.vllm import engine as vllm_engine
from pipeline.engines.vllm.runners import FlatRunner, RowsRunner, runner_of, score_with
from pipeline.errors import CheckError
from tests.engines.doubles import BLOCK, Flat, Rows, truth
from tests.engines.sequences import edge_cases

CASES = edge_cases(BLOCK)
REQUESTS = [request for group in CASES.values() for request in group]


@pytest.fixture(scope="module", autouse=True)
def _vllm_imported():
    """The environment that vLLM reads when it is first imported, and the one of before afterwards."""
    before = dict(os.environ)
    vllm_engine.prepare_environment()
    import vllm  # noqa: F401  # its parameters are real

    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("kind", [Flat, Rows])
@pytest.mark.parametrize("order", ["in order", "shuffled", "the other way round"])
def test_every_value_is_that_of_its_ids_however_full_the_cache_is(kind, order):
    engine = kind(v2=kind is Rows)
    places = list(range(len(REQUESTS)))
    places = {"in order": places, "the other way round": places[::-1]}.get(order) or random.Random(1).sample(
        places, len(places)
    )
    asked, runner = [REQUESTS[at] for at in places], runner_of(engine)
    # once into an empty cache, once with everything in it already, once without it
    for shared in (True, True, False):
        for request, found in zip(asked, score_with(runner, asked, shared=shared), strict=True):
            assert found.dtype == np.float32
            assert np.array_equal(found, truth(request))


@pytest.mark.parametrize("kind", [Flat, Rows])
def test_a_prompt_is_read_once_for_its_siblings(kind):
    engine = kind(v2=kind is Rows)
    whole = sum(map(len, REQUESTS))
    score_with(runner_of(engine), REQUESTS, shared=False)
    assert engine.read == whole
    assert all(how.skip_reading_prefix_cache for _, how in engine.sent)
    engine.read = 0
    engine.cached.clear()
    engine.sent.clear()
    score_with(runner_of(engine), REQUESTS, shared=True)
    assert not engine.sent[0][1].skip_reading_prefix_cache
    # most of the cases are made to defeat sharing
    assert engine.read < 0.9 * whole


def test_v1_reads_whole_blocks_of_a_prompt_first_and_asks_nothing_of_them():
    prompt = list(range(100, 100 + 2 * BLOCK + 1))
    # a prompt that ends with a block is in the cache to its end once its first response was read: the second is read alone
    for length, trunk, again in ((2 * BLOCK + 1, 2 * BLOCK, 0), (2 * BLOCK, BLOCK, 1), (BLOCK, 0, 1)):
        engine = Flat()
        asked = [Request(prompt[:length], [1, 2]), Request(prompt[:length], [3])]
        score_with(runner_of(engine), asked, shared=True)
        first, second = [*prompt[:length], 1, 2], [*prompt[:length], 3]
        sent = [(ids, how.skip_reading_prefix_cache) for ids, how in engine.sent]
        trunks = [(prompt[:trunk], False)] if trunk else []
        assert [how.prompt_logprobs for _, how in engine.sent] == [None] * len(trunks) + [0] * (len(sent) - len(trunks))
        assert sent == [*trunks, (first, False), (second, False), *[(second, True)] * again]


def test_v2_asks_for_the_responses_rows_only():
    engine = Rows(v2=True)
    score_with(runner_of(engine), [Request([5, 6, 7], [1, 2, 3]), Request([5, 6, 7], [1, 4])], shared=True)
    first, second = (how for _, how in engine.sent) if len(engine.sent) == 2 else (engine.sent[0][1], None)
    assert first.prompt_logprob_start == 2
    # the sibling's second token stands beside the first's, in the row that predicts both
    assert np.asarray(first.prompt_logprob_token_ids).tolist() == [[1, -1], [2, 4], [3, -1]]
    assert second is None


def test_v2_scores_a_branch_of_a_branch():
    """Its token's column stands in the rows of its parent, which begin behind what the parent shares with its own."""
    engine = Rows(v2=True)
    asked = [Request([5, 6, 7], ids) for ids in ([1, 2, 3, 4, 5, 6], [1, 2, 9, 9, 9], [1, 2, 9, 9, 7, 7], [1, 2, 9, 9])]
    for order in (asked, asked[::-1]):
        engine.sent.clear()
        engine.cached.clear()
        found = score_with(runner_of(engine), order, shared=True)
        assert all(np.array_equal(values, truth(request)) for values, request in zip(found, order, strict=True))
        assert not any(how.skip_reading_prefix_cache for _, how in engine.sent)


def test_v2_leaves_no_more_than_it_may_at_one_token():
    """vLLM answers 20 ids per row: a twenty-first sibling is asked by itself."""
    engine = Rows(v2=True)
    asked = [Request([5, 6, 7], [at, 1]) for at in range(30)]
    found = score_with(runner_of(engine), asked, shared=True)
    assert all(np.array_equal(values, truth(request)) for values, request in zip(found, asked, strict=True))
    assert max(np.asarray(how.prompt_logprob_token_ids).shape[1] for _, how in engine.sent) == 20


def test_the_runner_is_chosen_by_what_the_engine_offers(monkeypatch):
    assert isinstance(runner_of(Rows(v2=True)), RowsRunner)
    assert isinstance(runner_of(Flat()), FlatRunner)
    from vllm import SamplingParams

    class Older:
        """A vLLM whose parameters name no ids to score."""

    assert hasattr(SamplingParams, "prompt_logprob_token_ids")
    monkeypatch.setattr("vllm.SamplingParams", Older)
    assert isinstance(runner_of(Rows(v2=True)), FlatRunner)


@pytest.mark.parametrize(("device", "stances"), [("cpu", ["force_eager"]), ("cuda", [])])
def test_nothing_is_compiled_on_a_cpu(monkeypatch, device, stances):
    """The ranks that nobody asked for would take seconds to compile there."""
    import torch

    found = []
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: found.append(stance) or nullcontext())
    monkeypatch.setattr("pipeline.engines.vllm.runners.device_kind", lambda: device)
    score_with(runner_of(Flat()), TWO[:1], shared=False)
    assert found == stances


def test_each_runner_names_itself():
    assert str(runner_of(Flat())) == "V1 runner, flat log-probabilities"
    assert str(runner_of(Rows(v2=True))) == "V2 runner, response rows only"


def changed(**fields):
    """A spoiling of the last output's fields; those of the flat positions by `flat_<name>`."""

    def spoil(outputs):
        for name, change in fields.items():
            place = outputs[-1].prompt_logprobs if name.startswith("flat_") else outputs[-1]
            field = name.removeprefix("flat_")
            setattr(place, field, change(getattr(place, field)))
        return outputs

    return spoil


TWO = [Request([5, 6, 7], [1, 2, 3]), Request([8], [1, 4])]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda outputs: outputs[:-1], "answered 1 of 2 requests"),
        (changed(prompt_logprobs=lambda flat: None), "returned 0 positions for a sequence of 3"),
        (changed(flat_start_indices=lambda starts: starts[:-1]), "returned 2 positions for a sequence of 3"),
        (changed(num_cached_tokens=lambda number: None), "does not say how much"),
        (changed(flat_token_ids=lambda ids: [*ids[:-1], 9]), "of other token ids"),
        (changed(flat_token_ids=lambda ids: [9, *ids[1:]]), "of other token ids"),
        (changed(flat_end_indices=lambda ends: [*ends[:-1], ends[-1] + 1]), "of other token ids"),
        (changed(num_cached_tokens=lambda number: 1), r"computed 1 of 2 .*prompt of 1 tokens"),
        (changed(num_cached_tokens=lambda number: 2), r"computed 0 of 2 .*prompt of 1 tokens"),
    ],
)
def test_v1_answers_that_do_not_fit_are_refused(spoil, said):
    with pytest.raises(CheckError, match=said):
        score_with(runner_of(Flat(spoil=spoil)), TWO, shared=False)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda outputs: outputs[1:], "answered 1 of 2 requests"),
        (changed(prompt_token_id_logprobs=lambda rows: None), r"computed 0 of 2 .*prompt of 1 tokens"),
        (changed(prompt_token_id_logprobs=lambda rows: rows[:-1]), r"rows of the shape \(1, 1\), \(2, 1\) were asked"),
    ],
)
def test_v2_answers_that_do_not_fit_are_refused(spoil, said):
    with pytest.raises(CheckError, match=said):
        score_with(runner_of(Rows(v2=True, spoil=spoil)), TWO, shared=False)


@pytest.mark.parametrize("shared", [True, False])
def test_what_was_computed_and_is_no_number_is_told_from_what_was_not_computed(shared):
    def spoil(outputs):
        for output in outputs:
            if output.prompt_logprobs:
                output.prompt_logprobs.logprobs[-1] = float("nan")
        return outputs

    found = score_with(runner_of(Flat(spoil=spoil)), TWO, shared=shared)
    assert [values[-1] for values in found] == [-np.inf, -np.inf]
    assert all(np.array_equal(values[:-1], truth(request)[:-1]) for values, request in zip(found, TWO, strict=True))
    spoiled = changed(prompt_token_id_logprobs=lambda rows: np.where(np.arange(len(rows))[:, None] == 0, np.nan, rows))
    found = score_with(runner_of(Rows(v2=True, spoil=spoiled)), TWO, shared=shared)
    assert found[-1][0] == -np.inf
    assert np.array_equal(found[-1][1:], truth(TWO[-1])[1:])
