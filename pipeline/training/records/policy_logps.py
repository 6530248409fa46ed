"""policy_logps.parquet of one training: the policy's log-probabilities of single pairs, as steps and evaluations found them.

Nothing is computed for it: what a step and an evaluation have anyway is kept. A training pair has its last visit, a held-out
pair the evaluation before the first step and the newest one since. A reward model has none, so that no file is written.

Shapes: P pairs of a split, B pairs of a step or an evaluation; rows 0 and 1 of a [2, P] array are chosen and rejected.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from pipeline.artifacts import durable
from pipeline.artifacts.schemas import POLICY_LOGPS
from pipeline.artifacts.tables import parquet_writer
from pipeline.training.inputs.pairs import Pairs

log = logging.getLogger(__name__)

# pairs that are written together
_AT_ONCE = 65536
# instead of a number of updates: the pair was not seen yet
_NEVER = -1


class PolicyLogps:
    """Keeps sums and the number of updates before them, 20 bytes per pair and moment, and writes them as a table."""

    def __init__(self, path: Path, pairs: Pairs, held_out: Pairs) -> None:
        self._path = path
        self._kept = {
            "train": _Kept("train", pairs),
            "eval_first": _Kept("eval", held_out),
            "eval_last": _Kept("eval", held_out),
        }
        self._noted: tuple[Sequence[int], torch.Tensor] | None = None
        self._changed = False

    def note(self, rows: Sequence[int], sums_2B: torch.Tensor) -> None:
        """Take the sums of `rows` on their way from the device; they are kept, or dropped by the next, once it was waited for."""
        # into pinned memory and in the order of the device's work: nobody waits here
        self._noted = rows, sums_2B.detach().to("cpu", non_blocking=True)

    def keep_step(self, updates: int) -> None:
        """Keep what was noted of training pairs; the policy had had so many updates before. The device was waited for since."""
        self._keep("train", updates)

    def keep_evaluation(self, updates: int) -> None:
        """The same of held-out pairs."""
        self._keep("eval_last" if updates else "eval_first", updates)

    def write(self) -> None:
        """Write every pair that was seen; nothing if none was, or none since it was written last."""
        if not self._changed:
            return
        with durable.replacing(self._path) as temporary, parquet_writer(temporary, POLICY_LOGPS) as writer:
            for kept in self._kept.values():
                for table in kept.tables():
                    writer.write_table(table)
        self._changed = False

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps of it; empty if nothing was seen."""
        return {
            f"{name}/{part}": torch.from_numpy(array)
            for name, kept in self._kept.items()
            if kept.seen
            for part, array in (("logps", kept.logps_2P), ("updates", kept.updates_P))
        }

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from the `state` of a checkpoint; one of an earlier version has none, and only what follows is kept."""
        for name, kept in self._kept.items():
            if f"{name}/updates" not in state:
                continue
            logps, updates = state[f"{name}/logps"].numpy(), state[f"{name}/updates"].numpy()
            if updates.shape != kept.updates_P.shape:
                log.warning(
                    "%s begins anew: the checkpoint's was of %d pairs, not of %d",
                    self._path,
                    *map(len, (updates, kept.updates_P)),
                )
                continue
            kept.logps_2P[:], kept.updates_P[:], self._changed = logps, updates, True

    def _keep(self, name: str, updates: int) -> None:
        if self._noted is None:
            return
        rows, sums_2B = self._noted
        self._noted, self._changed = None, True
        kept = self._kept[name]
        kept.logps_2P[:, rows] = sums_2B.numpy()
        kept.updates_P[rows] = updates


class _Kept:
    """Sums of a split's pairs at one moment, and how many updates came before each."""

    def __init__(self, split: str, pairs: Pairs) -> None:
        self._split, self._pairs = split, pairs
        # memory of zeros is taken when it is written to
        self.logps_2P = np.zeros((2, len(pairs)))
        self.updates_P = np.full(len(pairs), _NEVER, np.int32)

    @property
    def seen(self) -> bool:
        """Whether any pair was."""
        return bool((self.updates_P != _NEVER).any())

    def tables(self) -> Iterator[pa.Table]:
        """The pairs that were seen, in their order, in tables of POLICY_LOGPS."""
        for start in range(0, len(self.updates_P), _AT_ONCE):
            rows = start + np.flatnonzero(self.updates_P[start : start + _AT_ONCE] != _NEVER)
            if not len(rows):
                continue
            columns = {
                "pair_id": [self._pairs.pair_ids[row] for row in rows.tolist()],
                "split": [self._split] * len(rows),
                "step": self.updates_P[rows].astype(np.int64),
                "chosen_logps": self.logps_2P[0, rows],
                "rejected_logps": self.logps_2P[1, rows],
            }
            yield pa.table(columns, schema=POLICY_LOGPS)
