"""Eight pairs with made-up scores of the reference."""

import pytest
import torch

from pipeline.forward.trees import Tree
from pipeline.training.inputs.pairs import Pairs
from tests.training.test_step import rows_of


@pytest.fixture
def pairs():
    rows = rows_of(8)
    trees = [Tree(row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"])) for row in rows]
    ref = [[-3.0 * torch.ones(len(row[side])).numpy() for row in rows] for side in ("chosen_ids", "rejected_ids")]
    return Pairs([f"p{number}" for number in range(8)], trees, *ref)
