"""The oracle engine reads prompts once, through the trainer's trees, and gives what a plain forward gives."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config.experiment import ReferenceConfig
from pipeline.engines.protocol import numerics_of
from pipeline.engines.sharing import Branch, branches_of, copy_shared, shared_tokens, siblings
from pipeline.engines.start import start_scorer
from pipeline.engines.transformers import batches, tree_of
from tests.engines.sequences import LIMIT, edge_cases, plain_logps

CASES = edge_cases(32)
REQUESTS = [request for group in CASES.values() for request in group]


@pytest.fixture(scope="module")
def scores(tiny_model):
    found = {}
    for shared in (True, False):
        reference = ReferenceConfig(
            model=str(tiny_model), engine="transformers", dtype="float32", share_prompts=shared, max_batched_tokens=700
        )
        with start_scorer(reference, tiny_model, numerics_of(reference), LIMIT) as scorer:
            found[shared] = scorer.score(REQUESTS)
    return found


@pytest.mark.parametrize("shared", [True, False])
def test_every_score_equals_a_plain_forward(shared, scores, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    for request, values in zip(REQUESTS, scores[shared], strict=True):
        assert np.abs(values - plain_logps(model, request)).max() < 1e-4


def test_batches_hold_every_sequence_once_within_their_budget():
    found = batches(REQUESTS, 700, lambda trees: sum(map(len, trees)))
    assert sorted(at for batch in found for tree in batch for at in tree) == list(range(len(REQUESTS)))
    for batch in found:
        for tree in batch:
            assert len({tuple(REQUESTS[at].prompt_ids) for at in tree}) == 1
        tokens = sum(len(tree_of(REQUESTS, tree)) for tree in batch)
        assert tokens <= 700 or (len(batch) == 1 and len(batch[0]) == 1)


def test_siblings_and_what_they_share():
    assert siblings(REQUESTS)[0] == [0, 1]
    assert [shared_tokens(a, b) for a, b in (([1, 2], [1, 3]), ([1], [1, 2]), ([], [1]), ([4], [5]))] == [1, 1, 0, 0]


def test_a_branch_leaves_the_earliest_of_those_it_shares_most_with():
    samples = [
        REQUESTS[0].__class__([7], ids) for ids in ([1, 2, 3, 4], [1, 2, 9], [1, 2, 9, 9], [5], [1, 2, 8], [1, 2])
    ]
    # longest first: 0, 2, then 1 (all of it in 2), 4, 5, 3
    assert branches_of(samples, range(6), 19) == [
        Branch(0, None, 0), Branch(2, 0, 2), Branch(1, 2, 3), Branch(4, 0, 2), Branch(5, 0, 2), Branch(3, 0, 0),
    ]  # fmt: skip
    # one child a token: the second that leaves the root at 2 is asked whole
    assert Branch(4, None, 0) in branches_of(samples, range(6), 1)


def test_copies_fill_holes_only_where_a_sibling_read_the_same_ids():
    samples = [REQUESTS[0].__class__([7], ids) for ids in ([1, 2, 3], [1, 2, 4])]
    holes = [np.array([-1, -2, -3], np.float32), np.array([np.nan, np.nan, np.nan], np.float32)]
    copy_shared(samples, holes)
    assert holes[1][:2].tolist() == [-1, -2]
    assert np.isnan(holes[1][2])
