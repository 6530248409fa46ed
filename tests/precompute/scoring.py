"""A whole plan scored with an engine of a test's own."""

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
