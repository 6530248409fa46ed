"""Trees merged and laid into one sequence, by hand."""

import pytest
import torch

from pipeline.forward import trees
from pipeline.forward.trees import Tree, merge, pack_trees, separated

CPU = torch.device("cpu")


def test_the_sizes_of_a_tree():
    tree = Tree([1, 2, 3], ([4, 5], [6], [7, 8, 9]))
    # the last token of a branch predicts nothing
    assert len(tree) == 3 + 1 + 0 + 2
    assert tree.longest == 3 + 3


def test_equal_trunks_and_branches_are_merged_and_found_again():
    given = [
        Tree([1, 2], ([3], [4])),
        Tree([9], ([3],)),
        Tree((1, 2), ([4], [5], [4])),
        Tree([9], ([3], [3, 4])),
        Tree([8], ([3],)),
    ]
    merged, places = merge(given)
    assert merged == [Tree((1, 2), ((3,), (4,), (5,))), Tree((9,), ((3,), (3, 4))), Tree((8,), ((3,),))]
    # counted through the merged trees: three branches of the first, then those of the second, then the third's
    assert places == [[0, 1], [3], [1, 2, 1], [3, 4], [5]]
    flat = [branch for tree in merged for branch in tree.branches]
    for tree, at in zip(given, places, strict=True):
        assert [list(flat[place]) for place in at] == [list(branch) for branch in tree.branches]


def test_separated_trees_have_one_branch_each():
    assert separated([Tree([1], ([2], [3])), Tree([4], ([5],))]) == [
        Tree([1], ([2],)),
        Tree([1], ([3],)),
        Tree([4], ([5],)),
    ]


@pytest.mark.parametrize("width", [1, 8, 5])
def test_a_pack_by_hand(monkeypatch, width):
    monkeypatch.setitem(trees._WIDTH, "cpu", width)
    packed = [Tree([11, 12, 13], ([21, 22, 23], [31, 32])), Tree([41], ([51], [61, 62]))]
    ids, pack, rows = pack_trees(packed, CPU)
    filling = -8 % width
    #                     trunk      | branch | branch | trunk | (a branch of one token) | branch
    assert ids.tolist() == [11, 12, 13, 21, 22, 31, 41, 61] + [0] * filling
    assert pack.tree_T.tolist() == [0, 0, 0, 0, 0, 0, 1, 1] + [2] * filling
    assert pack.branch_T.tolist() == [0, 0, 0, 1, 1, 2, 0, 2] + [-1] * filling
    assert pack.positions_T.tolist() == [0, 1, 2, 3, 4, 3, 0, 1] + [0] * filling
    assert pack.trees == [slice(0, 6), slice(6, 8)]
    assert pack.branches == [[slice(3, 5), slice(5, 6)], [slice(7, 7), slice(7, 8)]]
    # what predicts 21 22 23, 31 32, 51, 61 62
    assert rows.tolist() == [2, 3, 4, 2, 5, 6, 6, 7]
    assert {tensor.dtype for tensor in (ids, rows, pack.tree_T, pack.branch_T, pack.positions_T)} == {torch.int64}
    assert pack_trees([Tree([1], ([2, 3],))], CPU)[1].branches == [[slice(1, 2)]]


def test_widths_are_few():
    assert len(pack_trees([Tree([1] * 128, ([2],))], CPU)[0]) == 128
    assert len(pack_trees([Tree([1] * 128, ([2, 3],))], CPU)[0]) == 256
    # a device without compiled kernels wants no filling
    ids, pack, rows = pack_trees([Tree([1, 2], ([2, 3],))], torch.device("meta"))
    assert len(ids) == 3
    assert {one.device.type for one in (ids, rows, pack.tree_T, pack.branch_T, pack.positions_T)} == {"meta"}
