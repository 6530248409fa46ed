"""Attention over packs against plain attention with masks written out, and what it refuses."""

import itertools

import pytest
import torch

from pipeline.forward import attention, cpu_attention
from pipeline.forward.attention import NAME, as_attention_mask, attend, register
from pipeline.forward.trees import Tree, pack_trees

TREES = [
    Tree([1] * 5, ([2] * 4, [3] * 7, [4])),
    Tree([5] * 3, ([6] * 2,)),
    Tree([7] * 40, ([8] * 9, [9] * 3)),
    Tree([7], ([8] * 30,)),
]


def sequences():
    """Places in the pack of every path from the first token of a prompt to the end of a response."""
    _, pack, _ = pack_trees(TREES, torch.device("cpu"))
    for number, tree in enumerate(TREES):
        for branch in range(1, len(tree.branches) + 1):
            here = (pack.tree_T == number) & ((pack.branch_T == 0) | (pack.branch_T == branch))
            yield here.nonzero()[:, 0]


def sides(heads=4, key_heads=4, size=8, dtype=torch.float32):
    _, pack, _ = pack_trees(TREES, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    made = [
        torch.randn(1, number, len(pack.tree_T), size, generator=generator).to(dtype)
        for number in (heads, key_heads, key_heads)
    ]
    return pack, made


def plain(query, key, value, rows, window, scaling, softcap):
    """One sequence by itself, in float64 and in the open: [rows, heads, size]."""
    query, key, value = (side[0, :, rows].double() for side in (query, key, value))
    key, value = (side.repeat_interleave(len(query) // len(side), 0) for side in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    at = torch.arange(len(rows))
    seen = at[:, None] >= at[None, :]
    if window is not None:
        seen &= at[:, None] - at[None, :] < window
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(0, 1)


WAYS = list(itertools.product([None, 1, 3, 12, 100], [None, 0.7], [None, 2.0], [1, 2, 4]))


@pytest.mark.parametrize(("window", "scaling", "softcap", "groups"), WAYS)
def test_a_pack_gives_what_each_sequence_gives_alone(window, scaling, softcap, groups):
    pack, (query, key, value) = sides(4, 4 // groups)
    settings = {"scaling": scaling, "sliding_window": window, "softcap": softcap}
    found, weights = attend(torch.nn.Module(), query, key, value, as_attention_mask(pack), **settings)
    assert weights is None
    assert found.shape == (1, len(pack.tree_T), 4, 8)
    assert found.is_contiguous()
    for rows in sequences():
        expected = plain(query, key, value, rows, window, scaling, softcap)
        torch.testing.assert_close(found[0, rows].double(), expected, atol=1e-5, rtol=1e-5)
    # what fills the pack up is nothing
    assert not found[0, pack.trees[-1].stop :].any()


@pytest.mark.parametrize(("window", "scaling", "softcap"), list(itertools.product([None, 3], [None, 0.7], [None, 2.0])))
@pytest.mark.parametrize("autocast", [True, False])
def test_in_bfloat16_too(window, scaling, softcap, autocast, monkeypatch):
    pack, (query, key, value) = sides(4, 2, dtype=torch.float32 if autocast else torch.bfloat16)
    calls, ours = [], cpu_attention.attend
    monkeypatch.setattr(cpu_attention, "attend", lambda *given: calls.append(1) or ours(*given))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, _ = attend(
            torch.nn.Module(),
            query,
            key,
            value,
            as_attention_mask(pack),
            scaling=scaling,
            sliding_window=window,
            softcap=softcap,
        )
    # a cap is computed in the open
    assert len(calls) == (softcap is None)
    rounded = [side.bfloat16() for side in (query, key, value)]
    for rows in sequences():
        expected = plain(*rounded, rows, window, scaling, softcap)
        torch.testing.assert_close(found[0, rows].double(), expected, atol=4e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_sink_takes_its_share_of_every_position_and_gives_nothing(softcap, dtype):
    pack, operands = sides()
    query, key, value = (side.to(dtype) for side in operands)
    sinks = torch.tensor([-1.0, 0.0, 1.5, 3.0])
    found, _ = attend(
        torch.nn.Module(), query, key, value, as_attention_mask(pack), sliding_window=7, softcap=softcap, s_aux=sinks
    )
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 4e-2, "rtol": 2e-2}
    for rows in sequences():
        without = plain(query, key, value, rows, 7, None, softcap)
        # the softmax's sum without the sink, from scores that are all looked at
        groups = query.shape[1] // key.shape[1]
        keys = key[0, :, rows].repeat_interleave(groups, dim=0).double()
        scores = query[0, :, rows].double() @ keys.mT * query.shape[-1] ** -0.5
        scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
        places = torch.arange(len(rows))
        seen = (places[None] <= places[:, None]) & (places[:, None] - places[None] < 7)
        total = scores.exp().masked_fill(~seen, 0.0).sum(-1)
        share = total / (total + sinks.double().exp()[:, None])
        torch.testing.assert_close(found[0, rows].double(), without * share.T[:, :, None], **close)


def test_without_a_pack_it_is_one_causal_sequence():
    _, (query, key, value) = sides()
    for window in (None, 7):
        found, _ = attend(torch.nn.Module(), query, key, value, None, sliding_window=window)
        expected = plain(query, key, value, torch.arange(query.shape[2]), window, None, None)
        torch.testing.assert_close(found[0].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("term", [{"position_bias": torch.zeros(1)}, {"dropout": 0.1}])
def test_terms_that_it_does_not_know_are_refused(term):
    pack, (query, key, value) = sides()
    with pytest.raises(NotImplementedError, match="Module adds terms to its attention"):
        attend(torch.nn.Module(), query, key, value, as_attention_mask(pack), **term)
    absent = dict.fromkeys(term)
    assert attend(torch.nn.Module(), query, key, value, as_attention_mask(pack), **absent)[0].isfinite().all()


def test_a_mask_that_carries_no_pack_is_refused():
    _, (query, key, value) = sides()
    with pytest.raises(NotImplementedError, match="Module makes an attention mask of its own"):
        attend(torch.nn.Module(), query, key, value, torch.zeros(1, 1, 1, 1))


def test_the_carrier_is_no_mask():
    """An attention that adds it has NaN, and never a wrong number."""
    pack, _ = sides()
    tensor = as_attention_mask(pack)
    assert tensor.shape == (1, 1, 1, 1)
    assert tensor.isnan().all()
    assert tensor.refscore_pack is pack
    assert tensor.device == pack.tree_T.device


def test_everything_lies_where_the_pack_lies():
    """On a device without numbers, as if it were a GPU."""
    meta = torch.device("meta")
    _, pack, _ = pack_trees(TREES[:2], meta)
    alone = attention._one_sequence(5, meta)
    found = [as_attention_mask(pack), pack.dense_mask(0, 3, 32), alone.tree_T, alone.branch_T, alone.positions_T]
    assert {one.device.type for one in found} == {"meta"}
    assert {one.dtype for one in (alone.tree_T, alone.branch_T, alone.positions_T)} == {torch.int64}
    # one sequence is plainly causal and needs no mask
    assert alone.dense_mask(0, None, 32) is None
    capped = attention._sdpa(*torch.randn(3, 1, 2, 4, 8, device=meta), None, None, 2.0, None)
    assert (capped.device.type, capped.shape) == ("meta", (1, 2, 4, 8))


def test_transformers_knows_it_by_its_name():
    from transformers import AttentionInterface

    assert register() == NAME == "refscore_tree"
    # compiled layers leave it out
    assert AttentionInterface()[NAME].__wrapped__ is attend


@pytest.mark.parametrize("window", [None, 1, 4, 5, 6])
def test_masks_hold_what_a_token_may_see_and_are_made_once(window):
    trees = [Tree([1] * 4, ([2] * 3, [3] * 2)), Tree([5] * 3, ([6] * 3,))]
    _, pack, _ = pack_trees(trees, torch.device("cpu"))
    places = torch.arange(len(pack.tree_T))
    seen = pack.may_see(window)(0, 0, places[:, None], places[None, :])
    for number, tree in enumerate(trees):
        rows = pack.trees[number]
        wanted = torch.zeros(len(tree), len(tree), dtype=torch.bool)
        for q, k in itertools.product(range(len(tree)), repeat=2):
            at_q, at_k = rows.start + q, rows.start + k
            own = pack.branch_T[at_k] in (0, pack.branch_T[at_q])
            near = window is None or pack.positions_T[at_q] - pack.positions_T[at_k] < window
            wanted[q, k] = bool(own and k <= q and near)
        assert torch.equal(seen[rows, rows], wanted)
        dense = pack.dense_mask(number, window, 32)
        assert pack.dense_mask(number, window, 32) is dense
        if number == 1 and (window is None or window >= len(tree)):
            assert dense is None
            expected = torch.ones(32, 32).tril().bool()
        else:
            assert torch.equal(dense[: len(tree), : len(tree)], wanted)
            # the filling behind it sees one thing, and is seen by nobody
            assert dense[len(tree) :].sum(1).tolist() == [1] * (32 - len(tree))
            assert not dense[: len(tree), len(tree) :].any()
            expected = dense
        bias = pack.bias(number, window, 32)
        assert pack.bias(number, window, 32) is bias
        assert torch.equal(bias, torch.where(expected, 0.0, -torch.inf))
    # no tree sees another, nor the filling
    outside = torch.block_diag(*(torch.ones(len(tree), len(tree)) for tree in trees)).bool()
    total = sum(map(len, trees))
    assert not seen[:total, :total][~outside].any()
    assert not seen[:total, total:].any()


@pytest.mark.parametrize("window", [None, 3])
def test_the_block_mask_of_a_pack_is_made_once_and_says_the_same(window):
    pack, _ = sides()
    mask = pack.block_mask(window)
    assert pack.block_mask(window) is mask
    length = len(pack.tree_T)
    assert mask.seq_lengths == (length, length)
    places = torch.arange(length)
    ours = pack.may_see(window)(0, 0, places[:, None], places[None, :])
    assert torch.equal(mask.mask_mod(0, 0, places[:, None], places[None, :]), ours)
    assert pack.block_mask(7) is not mask


def test_lengths_are_few(monkeypatch):
    """torch keeps kernels for each of them."""
    seen = set()
    torchs = torch.nn.functional.scaled_dot_product_attention

    def counted(query, *rest, **how):
        seen.add(query.shape[2])
        return torchs(query, *rest, **how)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    for prompt in range(1, 70):
        _, pack, _ = pack_trees([Tree([1] * prompt, ([2, 3],)), Tree([1] * 3, ([2],))], torch.device("cpu"))
        given = torch.randn(1, 1, len(pack.tree_T), 4)
        attend(torch.nn.Module(), given, given, given, as_attention_mask(pack))
    assert seen == {32, 64, 96}
