"""Which process reads which examples of a step: a pure function of the step's examples, the same in every process.

A prompt's examples stay together, as their trunk is read once. Prompts go to processes longest first, each to the one with the
fewest tokens so far (Graham 1969: at most 4/3 of the best split). Every process makes as many forward passes as the one with the
most, as all take part in each gathering of weights: what it has not, it makes up with a pass that counts nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.config.training import TrainConfig
from pipeline.forward.trees import merge
from pipeline.training.inputs.batches import CountsTokens, Examples, micro_batches
from pipeline.training.parallel.world import World

# the pairs of a forward pass, and whether they count: a process without pairs reads some of another's along
Pass = tuple[list[int], bool]


def rows_by_rank(examples: Examples, rows: Sequence[int], size: int) -> list[list[int]]:
    """`rows` in `size` parts of about equal tokens, each in the order given."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for place, row in enumerate(rows):
        by_prompt.setdefault(tuple(examples.trees[row].trunk), []).append(place)
    tokens = {first[0]: tokens_of(examples, [rows[place] for place in first]) for first in by_prompt.values()}
    loads, parts = [0] * size, [list[int]() for _ in range(size)]
    for places in sorted(by_prompt.values(), key=lambda places: (-tokens[places[0]], places[0])):
        rank = min(range(size), key=lambda rank: (loads[rank], rank))
        loads[rank] += tokens[places[0]]
        parts[rank] += places
    return [[rows[place] for place in sorted(part)] for part in parts]


def tokens_of(examples: Examples, rows: Sequence[int]) -> int:
    """Tokens that trees of `rows` have, a trunk that several share counted once."""
    return sum(len(tree) for tree in merge([examples.trees[row] for row in rows])[0])


def passes(
    forward: CountsTokens,
    examples: Examples,
    rows: Sequence[int],
    train: TrainConfig,
    world: World,
    size: int | None = None,
) -> list[Pass]:
    """This process's forward passes over `rows`, as many as every other's. `size`: pairs in a pass, at most."""
    if world.alone:
        return [(group, True) for group in micro_batches(forward, examples, rows, train, size)]
    parts = [
        list(micro_batches(forward, examples, part, train, size)) for part in rows_by_rank(examples, rows, world.size)
    ]
    mine = parts[world.rank]
    missing = max(map(len, parts)) - len(mine)
    shortest = min(rows, key=lambda row: (len(examples.trees[row]), row))
    return [*((group, True) for group in mine), *(([shortest], False) for _ in range(missing))]


def counted(made: Sequence[Pass]) -> Iterator[int]:
    """The rows that count, in the order in which they are read."""
    for group, counts in made:
        if counts:
            yield from group


def places_of(rows: Sequence[int], made: Sequence[Pass]) -> list[list[int]]:
    """For each pass where its pairs stand among `rows`, which may hold a row twice if a step reaches into the next epoch.

    What does not count stands somewhere. A row's second place is in the same process, as a prompt's pairs stay together.
    """
    open_places: dict[int, list[int]] = {}
    for place, row in reversed(list(enumerate(rows))):
        open_places.setdefault(row, []).append(place)
    return [[open_places[row].pop() if counts else 0 for row in group] for group, counts in made]
