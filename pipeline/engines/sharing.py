"""Prompts read once: which parts of several sequences are the same, so that an engine computes them once.

Sequences are siblings if their prompt ids are equal. Siblings form a trie: a branch leaves its parent at the first token
in which their responses differ. Pure functions over token ids; no engine is known here. A score that was not computed is
NaN until it is copied from a sibling that was asked for the same token after the same ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.engines.protocol import Request


@dataclass(frozen=True)
class Branch:
    """A sequence in a trie of siblings.

    `position` is its place in the list of sequences, `parent` that of the sibling it leaves (None: the first of its prompt) and
    `depth` how many response tokens it shares with that parent.
    """

    position: int
    parent: int | None
    depth: int


def siblings(sequences: Sequence[Request]) -> list[list[int]]:
    """Places of the sequences with the same prompt, prompts in order of first occurrence."""
    groups: dict[bytes, list[int]] = {}
    for position, item in enumerate(sequences):
        groups.setdefault(np.asarray(item.prompt_ids, dtype=np.int32).tobytes(), []).append(position)
    return list(groups.values())


def shared_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading token ids are equal."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:length]) != np.asarray(b[:length]))
    return int(differ[0]) if len(differ) else length


def branches_of(sequences: Sequence[Request], group: Sequence[int], most_children: int) -> list[Branch]:
    """The trie of one group of siblings, parents before children.

    A branch leaves the earliest sibling with which it shares most, so the token after what they share is one that this
    parent computes by itself; longer ones come first, so that there is such a token. If `most_children` leave the same
    token already, a branch has no parent.
    """
    branches: list[Branch] = []
    children: dict[tuple[int, int], int] = {}
    for position in sorted(group, key=lambda position: -len(sequences[position].response_ids)):
        response = sequences[position].response_ids
        shared = [shared_tokens(response, sequences[other.position].response_ids) for other in branches]
        if not shared:
            branches.append(Branch(position, None, 0))
            continue
        nearest = int(np.argmax(shared))
        parent, depth = branches[nearest].position, shared[nearest]
        whole = depth == len(response)
        if not whole and children.get((parent, depth), 0) >= most_children:
            branches.append(Branch(position, None, 0))
            continue
        if not whole:
            children[parent, depth] = children.get((parent, depth), 0) + 1
        branches.append(Branch(position, parent, depth))
    return branches


def copy_shared(sequences: Sequence[Request], scores: list[np.ndarray]) -> None:
    """Fill NaNs of `scores` in place from siblings with the same ids up to and including that token."""
    for group in siblings(sequences):
        for position in group:
            if not np.isnan(scores[position]).any():
                continue
            for other in group:
                same = shared_tokens(sequences[position].response_ids, sequences[other].response_ids)
                own = scores[position][:same]
                scores[position][:same] = np.where(np.isnan(own), scores[other][:same], own)
