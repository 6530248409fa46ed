"""Scoring on a Ray cluster: `score_table.score` in a pool of Ray Data actors, read from and published by this process.

Only token ids and scores travel, so workers need no access to the store; they find the model as this machine does (a path
that exists there, or a Hub id) and refuse to score if its bytes are others. An actor that is lost is replaced by Ray
and its batch scored again; should both copies arrive, they are the same row of the store.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.experiment import ReferenceConfig
from pipeline.engines import score_table
from pipeline.engines.reference import open_reference
from pipeline.errors import CheckError, ConfigError
from pipeline.hardware import processors
from pipeline.precompute.plan import Plan
from pipeline.precompute.score import default_tokens_per_shard, publish_scores, shards_of

_SHARD = pa.schema(
    [("key", pa.binary(32)), ("prompt_ids", pa.list_(pa.int32())), ("response_ids", pa.list_(pa.int32()))]
)


class ScoringActor:
    """An actor: an engine, and the pure function on it."""

    def __init__(self, reference: dict[str, Any], reference_id: str, longest: int, threads: int) -> None:
        # set before torch and vLLM are imported
        os.environ["OMP_NUM_THREADS"] = str(threads)
        if threads < len(processors()):
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        config = ReferenceConfig.model_validate(reference | {"workers": 1, "launcher": "local"})
        opened = open_reference(config)
        reference_here = opened.identity.reference_id
        if reference_here != reference_id:
            raise CheckError(
                f"a Ray worker finds reference {reference_here[:12]} where {reference_id[:12]} is to be scored"
            )
        self._started = opened.start(longest)
        self._scorer = self._started.__enter__()

    def __call__(self, table: pa.Table) -> pa.Table:
        """The batch with its scores."""
        return score_table.score(table, self._scorer)


def score_missing(plan: Plan, on_shard: Callable[[int, int], None]) -> dict[bytes, str]:
    """Like `pipeline.precompute.score.score_missing`, on the cluster that RAY_ADDRESS names, else on one started here."""
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "reference.launcher is ray, which is not installed: install requirements/ray.txt, or refscore with the extra 'ray'"
        ) from None
    from ray.data import ActorPoolStrategy, DataContext

    reference = plan.reference.config
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # shards are batches: neither split nor merged on the way
    context.target_min_block_size = 0
    try:
        source = _write_shards(plan, reference.tokens_per_shard or default_tokens_per_shard(plan))
        with pq.ParquetFile(source) as file:
            blocks = [ray.put(file.read_row_group(number)) for number in range(file.num_row_groups)]
        gpu = plan.reference.numerics.device == "cuda"
        threads = max(1, int(ray.cluster_resources().get("CPU", 1)) // reference.workers)
        scored = ray.data.from_arrow_refs(blocks).map_batches(
            ScoringActor,
            batch_format="pyarrow",
            batch_size=None,
            compute=ActorPoolStrategy(size=reference.workers),
            num_gpus=reference.tensor_parallel_size if gpu else None,
            num_cpus=None if gpu else threads,
            fn_constructor_kwargs={
                "reference": reference.model_dump(mode="json"),
                "reference_id": plan.identity.reference_id,
                "longest": plan.longest_missing,
                "threads": threads,
            },
        )
        quarantined: dict[bytes, str] = {}
        for table in scored.iter_batches(batch_format="pyarrow", batch_size=None):
            requests = score_table.requests_in(table)
            quarantined |= publish_scores(plan, table["key"].to_pylist(), requests, score_table.logps_in(table))
            on_shard(len(requests), sum(map(len, requests)))
        return quarantined
    finally:
        if ours:
            ray.shutdown()


def _write_shards(plan: Plan, tokens: int) -> Path:
    """What is missing, one row group per shard."""
    path = Path(plan.pairs.directory.name) / "missing.parquet"
    with pq.ParquetWriter(path, _SHARD, compression="zstd") as writer:
        for shard in shards_of(plan, tokens):
            table = score_table.table_of([request for _, request in shard])
            keys = plan.keys.take(pa.array([position for position, _ in shard]))
            writer.write_table(table.add_column(0, "key", keys).cast(_SHARD), row_group_size=len(table))
    return path
