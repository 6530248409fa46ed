"""`Scorer` on several processes of this machine: each has an engine on a GPU, or on a set of processors, of its own.

Sequences go to the workers by prompt, so siblings stay together. A worker that dies is started again smaller, once, and its
part is scored again. Tables travel as Arrow; results come back in the order of the sequences.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline import errors
from pipeline.config.experiment import ReferenceConfig
from pipeline.engines import score_table
from pipeline.engines.protocol import Request
from pipeline.engines.sharing import siblings
from pipeline.engines.single import smaller, start_single
from pipeline.errors import ConfigError, RefscoreError
from pipeline.hardware import device_kind, processors
from pipeline.store.identity import Numerics

log = logging.getLogger(__name__)


class Workers:
    """See `pipeline.engines.protocol.Scorer`."""

    def __init__(self, reference: ReferenceConfig, directory: Path, numerics: Numerics, longest: int) -> None:
        shares = shares_of(reference)
        single = reference.model_copy(update={"workers": 1})
        self._workers: list[_Worker] = []
        try:
            for number, share in enumerate(shares):
                self._workers.append(_Worker(number, share, single, directory, numerics, longest))
            for worker in self._workers:
                worker.wait_until_ready()
        except BaseException:
            self.close()
            raise

    def score(self, sequences: Sequence[Request]) -> list[np.ndarray]:
        """See `Scorer.score`."""
        parts = parts_of(sequences, len(self._workers))
        scores: dict[int, np.ndarray] = {}
        with ThreadPoolExecutor(len(self._workers)) as pool:
            tables = [score_table.table_of([sequences[position] for position in part]) for part in parts]
            for part, table in zip(parts, pool.map(_Worker.score, self._workers, tables), strict=True):
                scores |= dict(zip(part, score_table.logps_in(table), strict=True))
        return [scores[position] for position in range(len(sequences))]

    def close(self) -> None:
        """See `Scorer.close`."""
        for worker in self._workers:
            worker.stop()


def shares_of(reference: ReferenceConfig) -> list[str]:
    """What each worker may use: GPU or processor numbers, comma-separated. ConfigError if there are too few."""
    if (device_kind() if reference.device == "auto" else reference.device) == "cuda":
        import torch

        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        units = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
        per_worker, kind = reference.tensor_parallel_size, "GPUs"
    else:
        units = list(map(str, processors()))
        per_worker, kind = len(units) // reference.workers, "processors"
    if per_worker < 1 or len(units) < reference.workers * per_worker:
        raise ConfigError(f"reference.workers is {reference.workers}, this machine has {len(units)} {kind} for them")
    return [",".join(units[worker * per_worker : (worker + 1) * per_worker]) for worker in range(reference.workers)]


def parts_of(sequences: Sequence[Request], count: int) -> list[list[int]]:
    """Places of the sequences in `count` parts of about as many tokens; siblings are in one part."""
    parts: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    groups = siblings(sequences)
    tokens = [sum(len(sequences[position]) for position in group) for group in groups]
    for number in sorted(range(len(groups)), key=lambda number: -tokens[number]):
        least = int(np.argmin(filled))
        parts[least] += groups[number]
        filled[least] += tokens[number]
    return parts


class _Worker:
    """A process, and our end of the line to it."""

    def __init__(
        self, number: int, share: str, reference: ReferenceConfig, directory: Path, numerics: Numerics, longest: int
    ) -> None:
        self._number, self._share, self._reference = number, share, reference
        self._rest = (directory, numerics, longest)
        self._may_retry = True
        self._start()

    def score(self, table: pa.Table) -> pa.Table:
        """The table with scores; raises what the engine raised."""
        if not len(table):
            return table.append_column("logps", pa.nulls(0, pa.list_(pa.float32())))
        try:
            self._line.send_bytes(score_table.to_bytes(table))
            self._answer()
            return score_table.from_bytes(self._line.recv_bytes())
        except (EOFError, OSError):
            self._start_again()
            return self.score(table)

    def wait_until_ready(self) -> None:
        """Return once the engine can score; raises what kept it from starting."""
        try:
            self._batched = int(self._answer()["batched_tokens"])
        except (EOFError, OSError):
            raise RefscoreError(
                f"worker {self._number} died while it loaded the model: too little memory for so many? Lower reference.workers"
            ) from None

    def stop(self) -> None:
        """End the process."""
        self._line.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        # no daemon: daemons may have no children, and a model that is spread over GPUs has one per GPU. It ends when the
        # line closes
        self._process = context.Process(target=serve, args=(theirs, self._share, self._reference, *self._rest))
        self._process.start()
        theirs.close()

    def _start_again(self) -> None:
        self._process.join()
        how = f"worker {self._number} died (exit code {self._process.exitcode})"
        tokens = smaller(self._batched)
        if not self._may_retry:
            raise RefscoreError(
                f"{how} again: set reference.max_batched_tokens={tokens} or less, or lower reference.workers"
            )
        self._may_retry = False
        log.warning(
            "%s: started again with %d tokens in a forward pass instead of %d; if it was memory, set "
            "reference.max_batched_tokens=%d to begin so",
            how, tokens, self._batched, tokens,
        )  # fmt: skip
        self._reference = self._reference.model_copy(update={"max_batched_tokens": tokens})
        self._start()
        self.wait_until_ready()

    def _answer(self) -> dict[str, str]:
        answer: dict[str, str] = json.loads(self._line.recv_bytes())
        if "error" in answer:
            raise getattr(errors, answer["error"])(answer["message"])
        return answer


def serve(
    line: Connection, share: str, reference: ReferenceConfig, directory: Path, numerics: Numerics, longest: int
) -> None:
    """The worker's process: start an engine on its share of the machine, answer tables until the line closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted and closes the line
    if numerics.device == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = share
    else:
        own = [int(unit) for unit in share.split(",")]
        os.sched_setaffinity(0, own)
        os.environ["OMP_NUM_THREADS"] = str(len(own))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = share
    try:
        with closing(start_single(reference, directory, numerics, longest)) as scorer:
            line.send_bytes(json.dumps({"batched_tokens": scorer.engine.batched_tokens}).encode())
            while True:
                table = score_table.from_bytes(line.recv_bytes())
                scored = score_table.to_bytes(score_table.score(table, scorer))
                line.send_bytes(b"{}")
                line.send_bytes(scored)
    except (EOFError, BrokenPipeError):
        return  # the line was closed, or whoever held its other end is gone
    except RefscoreError as error:
        line.send_bytes(json.dumps({"error": type(error).__name__, "message": str(error)}).encode())
