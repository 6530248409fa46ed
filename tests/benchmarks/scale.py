"""What runs where at 1, 8 and 64 GPUs and 1M, 100M and 1B sequences, from slopes that were measured: the tables of docs/scale.md,
which docs/generate.py writes.

Every slope stands in SLOPES with the command that measured it; what is not measured, the speed of a
GPU, is an assumption that stands beside the table. Nothing here was run at these sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

GPUS = (1, 8, 64)
SEQUENCES = (10**6, 10**8, 10**9)
# of one sequence: prompt and response together, the response alone; and of a pair, whose prompt is one
TOKENS, RESPONSE_TOKENS = 400, 200
PAIR = TOKENS + RESPONSE_TOKENS
# of the pairs of HH that `make bench-plan` tokenises: a prompt of 119, two responses of 44
MEASURED_PAIR = 207
# an assumption: half of what an H100's matrix units could do for 8 billion weights in bfloat16
TOKENS_PER_SECOND = 31_000
# planning runs on one machine, of at most so many GPUs
PROCESSORS_PER_GPU, GPUS_PER_MACHINE = 8, 8
TOKENS_PER_SHARD = 2**20


@dataclass(frozen=True)
class Slope:
    """Something that was measured: per what, in which unit, and by which command on what."""

    value: float
    unit: str
    says: str
    command: str


# 2026-11-29, two processors, alone
SLOPES = {
    "tokenise": Slope(
        509, "us of a processor per pair of 207 tokens", "rows to token ids, parts and keys", "make bench-plan"
    ),
    "again": Slope(11.1, "us per pair", "the next plan, from the cache", "make bench-plan"),
    "cache": Slope(
        755, "bytes per pair of 207 tokens", "the cache of token ids, texts and keys on the disk", "make bench-plan"
    ),
    # of a first plan, from one to two million pairs; of the next one 44
    "plan memory": Slope(
        77,
        "bytes per pair",
        "memory of a plan beyond its first 0.3 GiB, without pages of files",
        "make bench-plan SHORT=1",
    ),
    "lookup": Slope(1.4, "us per key asked", "a plan's question to an indexed store", "make bench-store"),
    "index": Slope(0.83, "us per key stored", "making the index", "make bench-store"),
    "index bytes": Slope(41, "bytes per sequence", "the index on the disk", "make bench-store"),
    "join": Slope(27.1, "us per pair of 200 tokens a response", "scores into pairs.parquet", "make bench-store"),
    "store": Slope(4.1, "bytes per response token", "the store in float32", "refscore store ls"),
    "requests": Slope(
        1, "request per 1,000 shards", "a plan's listing of shards at S3, beside two", "make bench-store"
    ),
    "index requests": Slope(
        16, "MiB per request", "a plan's fetching of the index, beside 16 for its files", "make bench-store"
    ),
}


def tables() -> str:
    """Both tables as Markdown."""
    slopes = ["| | | measured by |", "| --- | ---: | --- |"]
    slopes += [f"| {slope.says} | {slope.value:g} {slope.unit} | `{slope.command}` |" for slope in SLOPES.values()]
    lines = [
        "| sequences | GPUs | tokenise | next plan | its memory | cache | store | index | shards | its requests to S3 | score | join | its file |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [_row(sequences, gpus) for sequences in SEQUENCES for gpus in GPUS]
    return "\n".join([*slopes, "", *lines])


def _row(sequences: int, gpus: int) -> str:
    slope = {name: one.value for name, one in SLOPES.items()}
    pairs, shards = sequences / 2, sequences * TOKENS / TOKENS_PER_SHARD
    # as if all that a pair takes grew with its tokens
    longer = PAIR / MEASURED_PAIR
    cells = [
        f"{sequences:,}",
        str(gpus),
        _time(longer * pairs * slope["tokenise"] / 1e6 / (min(gpus, GPUS_PER_MACHINE) * PROCESSORS_PER_GPU)),
        _time((pairs * slope["again"] + sequences * slope["lookup"]) / 1e6),
        _size(0.3 * 2**30 + pairs * slope["plan memory"]),
        _size(longer * pairs * slope["cache"]),
        _size(sequences * RESPONSE_TOKENS * slope["store"]),
        _size(sequences * slope["index bytes"]),
        f"{shards:,.0f}",
        f"{18 + shards * slope['requests'] / 1000 + sequences * slope['index bytes'] / (slope['index requests'] * 2**20):,.0f}",
        _time(sequences * TOKENS / TOKENS_PER_SECOND / gpus),
        _time(pairs * slope["join"] / 1e6),
        # by construction: float32 values of every response, in a mapped file while it joins
        _size(sequences * RESPONSE_TOKENS * 4),
    ]
    return f"| {' | '.join(cells)} |"


def _time(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _size(size: float) -> str:
    for of, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if size >= of:
            return f"{size / of:.1f} {unit}"
    return f"{size:.0f} B"
