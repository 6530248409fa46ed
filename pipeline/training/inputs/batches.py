"""Which examples a forward pass takes, whatever they are: trees of token ids under a name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from pipeline.config.training import TrainConfig
from pipeline.forward.trees import Tree
from pipeline.hardware import device_kind


class Examples(Protocol):
    """Stored examples in the order of their table; each is a prompt with its responses, one tree."""

    @property
    def ids(self) -> Sequence[str]:
        """A name of each."""
        ...

    @property
    def trees(self) -> Sequence[Tree]:
        """The token ids of each."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, a prompt with one response."""
        ...

    @property
    def ends(self) -> set[int]:
        """Tokens that end a response."""
        ...

    def __len__(self) -> int: ...


class CountsTokens(Protocol):
    """A pass over trees that knows how much it reads."""

    def tokens(self, trees: Sequence[Tree]) -> int:
        """Tokens that the model reads for `trees`, filling included."""
        ...


def micro_batches(
    forward: CountsTokens, examples: Examples, rows: Iterable[int], train: TrainConfig, size: int | None = None
) -> Iterable[list[int]]:
    """Rows of each forward pass: at most `train.tokens_per_batch` tokens of those that `forward` reads for them, and `size`
    examples if it is given; those of one prompt together, similar lengths together. One that is longer runs alone.
    """
    budget = tokens_in_a_pass(train, device_kind())
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        by_prompt.setdefault(tuple(examples.trees[row].trunk), []).append(row)
    longest_first = sorted(by_prompt.values(), key=lambda same: (-max(len(examples.trees[row]) for row in same), same))
    group: list[int] = []
    for row in (row for same in longest_first for row in same):
        if group and (
            len(group) == size or forward.tokens([examples.trees[member] for member in (*group, row)]) > budget
        ):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def tokens_in_a_pass(train: TrainConfig, kind: str) -> int:
    """`train.tokens_per_batch`, or what keeps a device of `kind` busy and fits its memory."""
    return train.tokens_per_batch or {"cpu": 1024, "cuda": 8192}[kind]
