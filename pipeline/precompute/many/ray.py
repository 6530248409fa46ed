"""A job in a pool of Ray Data actors, on this machine or on a cluster: each has an engine and publishes what it scores.

The driver writes the groups as they are planned, and counts; only their names travel, and what came of them. Actors reach the
place of the job and the store, find the model as this machine does (a path that exists there, or a Hub id), and refuse to score if
its bytes are others. An actor that is lost is replaced by Ray, and what it had in hand is tried again.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline import errors
from pipeline.artifacts import durable
from pipeline.artifacts.writer import this_process
from pipeline.config.experiment import ReferenceConfig
from pipeline.engines.growing import Growing
from pipeline.engines.reference import OpenedReference, open_reference
from pipeline.errors import CheckError, ConfigError, RefscoreError, first_line
from pipeline.hardware import processors
from pipeline.precompute.many.attempts import next_attempt
from pipeline.precompute.many.job import Job, Result
from pipeline.precompute.many.worker import Worker, minutes_until_it_hangs
from pipeline.precompute.score import Target, lengths_in, target_of
from pipeline.progress import SILENT, Listener
from pipeline.store.places import is_url
from pipeline.store.tidying.retention import JOB

log = logging.getLogger(__name__)

# seconds between two looks for the next group
_LOOK = 0.3
# workers that died while they started an engine, where none has started one
_DIED_AT_START = 3
# groups in a row over which workers do nothing but die
_LOST_IN_A_ROW = 3
# characters of a path after which the names of sockets below it, 107 at most, still find room
_SHORT = 25
# bytes of names and results in flight
_OBJECTS = 2**27


class ScoringActor:
    """An engine in an actor. Two calls run at a time: while one has the engine, the other reads its group or publishes it.

    The engine lives in a thread of its own, as calls come in any. What is wrong with more than a group is not raised, which
    would be lost among Ray's own errors, but answered.
    """

    def __init__(self, reference: dict[str, Any], wanted: dict[str, Any], where: str, threads: int) -> None:
        # set before torch and vLLM are imported
        os.environ["OMP_NUM_THREADS"] = str(threads)
        if threads < len(processors()):
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        with suppress(OSError):
            os.chdir(where)  # paths of the configuration are relative to it
        self._engine_thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._problem: RefscoreError | None = None
        try:
            opened = open_reference(ReferenceConfig.model_validate(reference))
            here = opened.identity.reference_id
            if here != wanted["reference_id"]:
                raise CheckError(
                    f"a Ray worker finds reference {here[:12]} where {wanted['reference_id'][:12]} is to be scored"
                )
            engine = Growing(opened, wanted["limit"])
            self._job = Job(wanted["job"])
            minutes = minutes_until_it_hangs(opened.config)
            try:
                with _noted(self._job, wanted["workers"]):
                    self._engine_thread.submit(engine.ready, wanted["longest"]).result(60 * minutes)
            except TimeoutError:
                raise RefscoreError(
                    f"an engine did not start within {minutes:g} minutes in a Ray worker: reference.hangs_after says how long one "
                    "waits"
                ) from None
            self._worker = Worker(self._job, target_of(opened), engine)
        except Exception as error:  # noqa: BLE001  # it is answered
            self._problem = _as_answered(error)

    def __call__(self, table: pa.Table) -> pa.Table:
        """What came of each group, and what is wrong."""
        return pa.Table.from_pylist([self._answer(group) for group in table["group"].to_pylist()], _ANSWERS)

    def _answer(self, group: str) -> dict[str, str]:
        try:
            if self._problem is not None:
                raise self._problem
            return {"result": json.dumps(asdict(self._scored(group)))}
        except Exception as error:  # noqa: BLE001  # it is answered
            self._problem = _as_answered(error)
            return {"error": json.dumps([type(self._problem).__name__, str(self._problem)])}

    def _scored(self, group: str) -> Result:
        while (result := self._job.result(group)) is None:
            taken = self._worker.take(next_attempt(self._job, group))
            scores = self._engine_thread.submit(self._worker.score, taken).result()
            if scores is not None:
                result = self._worker.publish(taken, scores)
                break
        return result


@contextmanager
def _noted(job: Job, workers: int) -> Iterator[None]:
    """Leave word that an engine starts, and that it has. Raises RefscoreError if workers do nothing but die over that: Ray would
    start them for ever.
    """
    if not job.names("ready") and (died := len(job.names("starts")) - workers) >= _DIED_AT_START:
        raise RefscoreError(
            f"{died} workers and more died while they started an engine, and none has started one: too little memory? Lower "
            "reference.workers, or set reference.max_batched_tokens or reference.kv_cache_gib"
        )
    name = f"{this_process('').token}.json"
    job.put_new(f"starts/{name}", {})
    yield
    job.put_new(f"ready/{name}", {})


def _as_answered(error: Exception) -> RefscoreError:
    """Ray would say of an error where it came up, and not what it is."""
    if isinstance(error, RefscoreError):
        return error
    return RefscoreError(
        f"a Ray worker stopped ({type(error).__name__}: {first_line(error)}): what was published before stays, and the same "
        "command goes on from there"
    )


_ANSWERS = pa.schema([("result", pa.string()), ("error", pa.string())])


def score_shards(
    target: Target,
    shards: Iterable[pa.Table],
    limit: int | None,
    on_shard: Callable[[int, int], None],
    listener: Listener = SILENT,
) -> dict[bytes, str]:
    """Like `pipeline.precompute.score.score_shards`, on the cluster that RAY_ADDRESS names, or in actors on this machine.

    `limit`: tokens that no sequence exceeds, if that is known. Beside what is not finite, what made workers die is left out.
    Raises ConfigError if Ray is not installed or has too little for the workers, RefscoreError if workers cannot be kept alive.
    """
    config = target.reference.config
    shards = iter(shards)
    first = next(shards, None)
    if first is None:
        return {}
    listener.say(f"starting {config.engine} in {config.workers} Ray actors ...")
    quarantined: dict[bytes, str] = {}
    with _job(target) as job, _cluster(config) as ray, _written(job, chain([first], shards)):
        wanted = {
            "job": job.place, "reference_id": target.reference.identity.reference_id, "limit": limit,
            "longest": int(lengths_in(first).max()), "workers": config.workers,
        }  # fmt: skip
        lost = _Lost()
        try:
            for result in _results(ray, target.reference, wanted):
                lost.must_be_few(result)
                quarantined |= {bytes.fromhex(key): why for key, why in result.left_out.items()}
                if result.failures:
                    log.warning(
                        "%d sequences were scored again: a worker died, hung or broke down over them, %d times",
                        result.sequences, result.failures,
                    )  # fmt: skip
                on_shard(result.sequences, result.tokens)
        except ray.exceptions.RayError as error:
            raise RefscoreError(
                f"the workers cannot be kept alive ({first_line(error)}): too little memory for so many? Lower "
                "reference.workers, or set reference.max_batched_tokens"
            ) from None
    return quarantined


class _Lost:
    """Groups in a row of which no sequence was scored, as workers died over each."""

    def __init__(self) -> None:
        self._groups = 0

    def must_be_few(self, result: Result) -> None:
        """Raises RefscoreError if it is no fault of the sequences."""
        self._groups = self._groups + 1 if result.failures and len(result.left_out) == result.sequences else 0
        if self._groups >= _LOST_IN_A_ROW:
            raise RefscoreError(
                f"workers died over every sequence of {self._groups} groups in a row: too little memory for one? Set "
                "reference.max_batched_tokens, or fewer reference.workers. What was published before stays"
            )


def _results(ray: Any, reference: OpenedReference, wanted: dict[str, Any]) -> Iterator[Result]:
    """What came of each group, as it comes. Raises what an actor answered."""
    config = reference.config
    gpu = reference.numerics.device == "cuda"
    threads = threads_of_each(config, ray.cluster_resources(), gpu=gpu)
    here = config.model_dump(mode="json") | {"workers": 1, "launcher": "local", "store": _absolute(config.store)}
    answers = ray.data.read_datasource(_groups(wanted["job"]), override_num_blocks=1, num_cpus=0).map_batches(
        ScoringActor,
        batch_format="pyarrow",
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=config.workers, initial_size=config.workers,
            max_concurrent_calls_per_actor=2, max_tasks_in_flight_per_actor=4, enable_true_multi_threading=True,
        ),
        num_gpus=config.tensor_parallel_size if gpu else None,
        num_cpus=None if gpu else threads,
        fn_constructor_kwargs={"reference": here, "wanted": wanted, "where": str(Path.cwd()), "threads": threads},
    )  # fmt: skip
    for table in answers.iter_batches(batch_format="pyarrow", batch_size=None, prefetch_batches=0):
        for answer in table.to_pylist():
            if answer["error"] is not None:
                name, message = json.loads(answer["error"])
                raise getattr(errors, name, RefscoreError)(message)
            yield Result(**json.loads(answer["result"]))


def threads_of_each(config: ReferenceConfig, resources: dict[str, float], *, gpu: bool) -> int:
    """Processors for each worker. Raises ConfigError if there are too few, or too few GPUs, on what is to be this machine."""
    units, kind = int(resources.get("GPU" if gpu else "CPU", 0)), "GPUs" if gpu else "processors"
    each = config.tensor_parallel_size if gpu else max(1, units // config.workers)
    if config.launcher == "local" and units < config.workers * each:
        raise ConfigError(f"reference.workers is {config.workers}, this machine has {units} {kind} for them")
    return max(1, int(resources.get("CPU", 1)) // config.workers)


def _groups(place: str) -> Any:
    """The names of the job's groups as they appear, as a source of Ray Data: each is a block, in an order that never changes."""
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    class Groups(Datasource):  # type: ignore[misc]  # Ray's types are not read
        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[Any]:  # noqa: ARG002  # Ray's names
            nothing_known = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [ReadTask(lambda: names_of_groups(Job(place)), nothing_known)]

        def estimate_inmemory_data_size(self) -> int | None:
            return None

    return Groups()


def names_of_groups(job: Job) -> Iterator[pa.Table]:
    """The job's groups, each in a table of its own, from the first to the last; waits for those that are still to come."""
    number = 0
    while True:
        if job.has(number):
            yield pa.table({"group": [job.group(number)]})
            number += 1
        elif job.groups() == number or job.withdrawn():
            return
        else:
            time.sleep(_LOOK)


@contextmanager
def _cluster(config: ReferenceConfig) -> Iterator[Any]:
    """Ray, started here unless it is or a cluster is to be used; what was started here is stopped."""
    # it speaks before its loggers can be told not to
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError:
        raise ConfigError(
            f"reference.workers={config.workers} and reference.launcher={config.launcher} need Ray, which is not installed: "
            "install requirements/ray.txt, or refscore with the extra 'ray'; reference.workers=1 needs none"
        ) from None
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ours = not ray.is_initialized()
    # what Ray writes of a session stays otherwise, some MB each
    place = _ray_place() if ours and config.launcher == "local" else None
    if ours:
        quiet = {"log_to_driver": False, "include_dashboard": False, "configure_logging": False}
        if config.launcher == "ray":
            try:
                ray.init(**quiet)
            except (ConnectionError, RuntimeError, ValueError) as error:
                address = os.environ.get("RAY_ADDRESS", "not set")
                raise ConfigError(
                    f"reference.launcher=ray: the cluster that RAY_ADDRESS names ({address}) cannot be used ({first_line(error)}): "
                    "start it or correct the address, or leave reference.launcher away"
                ) from None
        else:
            ray.init(
                address="local", num_cpus=len(processors()), object_store_memory=_OBJECTS, _temp_dir=place, **quiet
            )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # every name is a block of its own, so that each goes to whichever actor is free
    context.target_min_block_size = 0
    context.target_max_block_size = 1
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()
        if place:
            shutil.rmtree(place, ignore_errors=True)


def _ray_place() -> str | None:
    """A directory for the working files of a Ray of our own; None if Ray is told one, or could not name its sockets there."""
    if os.environ.get("RAY_TMPDIR") or len(tempfile.gettempdir()) > _SHORT:
        return None
    return tempfile.mkdtemp(prefix="ray-")


@contextmanager
def _job(target: Target) -> Iterator[Job]:
    """A job where the actors reach it: on this machine among its working files, for a cluster beside the scores. It is removed."""
    config = target.reference.config
    if config.launcher == "ray":
        (store, *_) = _absolute(config.store)
        place = f"{store}/{target.reference.identity.reference_id}/{JOB}{this_process('').token}"
    else:
        place = f"{durable.scratch_place() or tempfile.gettempdir()}/{JOB}{this_process('').token}"
    job = Job(place)
    job.begin(target.reference.identity.reference_id)
    try:
        yield job
    finally:
        # an actor of a cluster may still be writing to it
        with suppress(RefscoreError):
            job.remove()


@contextmanager
def _written(job: Job, shards: Iterator[pa.Table]) -> Iterator[None]:
    """Within the block a thread writes the groups as they are planned; what went wrong with that is raised after it."""
    unwanted = threading.Event()

    def write() -> None:
        number = 0
        try:
            for shard in shards:
                if unwanted.is_set():
                    return
                job.add(number, shard)
                number += 1
        finally:
            try:
                job.complete(number)
            except RefscoreError:
                job.withdraw()
                raise

    with ThreadPoolExecutor(1, thread_name_prefix="planning") as pool:
        writing = pool.submit(write)
        try:
            yield
        finally:
            unwanted.set()
        writing.result()


def _absolute(places: list[str]) -> list[str]:
    return [place if is_url(place) else str(Path(place).expanduser().absolute()) for place in places]
