"""The columns of the tables that pass between stages, and of the store's shards."""

from __future__ import annotations

import pyarrow as pa

_ids = pa.list_(pa.int32())
_logps = pa.list_(pa.float32())
# marks a column that files of an earlier version lack; it reads as null
_LATER = {b"later": b"true"}
# marks whole numbers whose bytes are stored apart, as those of floats are: the first of them are all alike
SPLIT = b"split"

# of a table, raised if a reader of before would misread it; a column that is added needs no new format
FORMAT_KEY = b"refscore_format"
FORMAT = 1
PAIRS = pa.schema(
    [
        ("pair_id", pa.string()),
        ("split", pa.string()),
        ("source", pa.string()),
        ("source_row", pa.int64()),
        ("topic", pa.string()),
        ("prompt", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("prompt_ids", _ids),
        ("chosen_ids", _ids),
        ("rejected_ids", _ids),
        ("ref_chosen_token_logps", _logps),
        ("ref_rejected_token_logps", _logps),
        # sums, under TRL's names and with TRL's meaning; in format 1 these names held the lists
        ("ref_chosen_logps", pa.float64()),
        ("ref_rejected_logps", pa.float64()),
        # how much better chosen was found than rejected, if the data says so
        pa.field("margin", pa.float64(), metadata=_LATER),
    ],
    metadata={FORMAT_KEY: b"2"},
)
# one row per response, those of a group (a prompt's list, or a response with a mismatched one beside it) one after the other
RESPONSES = pa.schema(
    [
        ("group_id", pa.string()),
        ("split", pa.string()),
        ("source", pa.string()),
        ("source_row", pa.int64()),
        ("topic", pa.string()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        # "response"; "mismatched": the response to another prompt, by which KTO's baseline is measured; "prompt": one alone
        ("kind", pa.string()),
        ("label", pa.bool_()),
        ("score", pa.float64()),
        ("prompt_ids", _ids),
        ("response_ids", _ids),
        ("ref_response_token_logps", _logps),
        ("ref_response_logps", pa.float64()),
    ]
)
# one row per sample, those of a prompt one after the other; `logps` are under the model that wrote it
ROLLOUTS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("topic", pa.string()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("prompt_ids", _ids),
        ("response_ids", _ids),
        ("finish_reason", pa.string()),
        # the judge's, as it gave it; null if it failed
        ("reward", pa.float64()),
        ("logps", _logps),
        ("ref_logps", _logps),
        ("logp", pa.float64()),
        ("ref_logp", pa.float64()),
        # a critic's, of the state before each token; null if rollout.critic names none
        pa.field("values", _logps, metadata=_LATER),
    ]
)
# the rewards of a shard of samples that rollouts.parquet is made of, as the judge gave them; null if it failed
REWARDS = pa.schema([("prompt_id", pa.string()), ("sample", pa.int32()), ("reward", pa.float64())])
# a critic's values of a shard of samples, of those that have a token
VALUES = pa.schema([("prompt_id", pa.string()), ("sample", pa.int32()), ("values", _logps)])
# what pairs.parquet says of itself if others computed its scores: who. Then values per token may be null beside their sum
IMPORTED_BY = "imported_by"
# what a shard says of itself if its rows were taken over from an adopted reference: that reference's id; pairs.parquet: of how many
# sequences that is so, by id
COMPUTED_BY = "computed_by"
# what pairs.parquet says of itself if its values per token were rounded: by how many nats at most; their sums were not
ROUNDING = "rounding"
DROPPED = pa.schema(
    [
        ("source", pa.string()),
        ("source_row", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        # of pairs that were tokenised before they were left out
        pa.field("prompt_ids", _ids, metadata=_LATER),
        pa.field("chosen_ids", _ids, metadata=_LATER),
        pa.field("rejected_ids", _ids, metadata=_LATER),
    ]
)
# sequences that have no score yet: what an engine is asked for
MISSING = pa.schema(
    [("key", pa.binary(32)), ("prompt_ids", pa.list_(pa.int32())), ("response_ids", pa.list_(pa.int32()))]
)

SCORES = pa.schema(
    [
        pa.field("key", pa.binary(32), nullable=False),
        pa.field("prompt_tokens", pa.int32(), nullable=False),
        pa.field("response_tokens", pa.int32(), nullable=False),
        pa.field("logps", pa.list_(pa.field("element", pa.float32(), nullable=False)), nullable=False),
        pa.field("logp", pa.float64(), nullable=False),
    ]
)
# logps in units of -2^-12 nats; see pipeline.store.fixed_point
ROUNDED_SCORES = SCORES.set(
    SCORES.get_field_index("logps"),
    pa.field(
        "logps",
        pa.list_(pa.field("element", pa.int32(), nullable=False)),
        nullable=False,
        metadata={SPLIT: b"true"},
    ),
)
SCORED = pa.schema(
    [
        ("source_row", pa.int64()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("prompt_ids", _ids),
        ("response_ids", _ids),
        ("logps", _logps),
        ("logp", pa.float64()),
        ("problem", pa.string()),
    ]
)
# beside a response's own scores, for each of its tokens the likeliest tokens there, the likeliest first
TOP_SCORED = pa.schema([*SCORED, ("top_ids", pa.list_(_ids)), ("top_logps", pa.list_(_logps))])
TRAIN_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
# of objectives that learn from responses instead of pairs; TRL's names if it has one
RESPONSE_METRICS = (
    "kl",
    "reward",
    "reward_std",
    "ratio/mean",
    "ratio/max",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "kl/behaviour",
    "value/mean",
    "value/explained_variance",
)
METRICS = pa.schema(
    [("step", pa.int64())]
    + [(name, pa.float64()) for name in TRAIN_METRICS]
    + [
        (name, pa.float64())
        for name in ("grad_norm", "learning_rate", "step_seconds", "tokens_per_second", "peak_memory_gib")
    ]
    + [(f"eval_{name}", pa.float64()) for name in TRAIN_METRICS]
    # of what is held out nobody samples: only the baseline of KTO is known there
    + [pa.field(name, pa.float64(), metadata=_LATER) for name in (*RESPONSE_METRICS, "eval_kl")]
)
# sums over a response's tokens; `step`: how many updates the policy had had
POLICY_LOGPS = pa.schema(
    [
        ("pair_id", pa.string()),
        ("split", pa.string()),
        ("step", pa.int64()),
        ("chosen_logps", pa.float64()),
        ("rejected_logps", pa.float64()),
    ]
)
SAMPLES = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("model", pa.string()),
        ("topic", pa.string()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("response_ids", _ids),
        ("finish_reason", pa.string()),
        ("tokens", pa.int32()),
    ]
)
JUDGEMENTS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("judge", pa.string()),
        ("model", pa.string()),
        ("baseline", pa.string()),
        ("order", pa.string()),
        ("winner", pa.string()),
        ("score", pa.float64()),
        # what a judge that writes wrote, or why it did not
        pa.field("words", pa.string(), metadata=_LATER),
    ]
)
# samples at temperature 1 with their logps under the model that wrote them and under the reference
KL = pa.schema(
    [
        *SAMPLES,
        ("logps", _logps),
        ("ref_logps", _logps),
        ("logp", pa.float64()),
        ("ref_logp", pa.float64()),
        pa.field("exact_kl", _logps, metadata=_LATER),
    ]
)
