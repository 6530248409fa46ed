"""A whole plan scored with an engine of a test's own."""

import numpy as np

from pipeline.pairs.table import Grown
from pipeline.precompute.score import Target, score_shards, shards_of, windows_of


def not_in_an_index(store):
    """The shards of a store's first place that whoever asks has to read."""
    place = store.places[0]
    listing = place.listed()
    return place.indexes.covering(listing.indexes, listing.shards)[1]


def tables_of(plan):
    """What the plan lacks, window by window."""
    return (window.missing for window in windows_of(plan))


def score_all(plan, engine, on_shard=lambda sequences, tokens: None):
    """Score what the plan lacks; returns what `score_shards` does."""
    return score_shards(
        Target(plan.reference, plan.store), shards_of(plan.reference, tables_of(plan)), engine, on_shard
    )


def lengthened(plan, position, path):
    """Let the plan say that the response at `position` has a token more than it has."""
    lengths = plan.pairs.response_tokens.copy()
    lengths[position] += 1
    plan.pairs.columns.response_tokens = Grown(path, np.int32)
    plan.pairs.columns.response_tokens.extend(lengths)
