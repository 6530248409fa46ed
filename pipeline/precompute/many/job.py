"""A job: what is missing, written once, a file a group, in a directory or at a URL that every process reaches; and what became
of each group. No process that scores plans again.

    plan.json                  whose scores they are; who plans, and a beat while that process lives
    missing/00000000.parquet   a group: rows of MISSING that are scored and published together
    claims/00000000.1.json     the first attempt at it: whose, and a beat while that process lives
    done/00000000.json         what came of it
    complete.json              no further group comes
    starts/ ready/             of workers that Ray starts: begun to start an engine, and done so

A claim and a result are files that must not exist yet: two processes that want the same one cannot both have it. Who looks finds
a file whole or not at all; one that is damaged says nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts import durable
from pipeline.artifacts.schemas import MISSING
from pipeline.artifacts.tables import parquet_writer
from pipeline.errors import ConfigError, DataError, RefscoreError, first_line
from pipeline.precompute.score import tokens_in

PLAN, COMPLETE = "plan.json", "complete.json"


@dataclass(frozen=True)
class Result:
    """What came of a group: its sequences and tokens, keys (hex) of sequences that are not in the store, and why, and how many
    attempts at it failed.
    """

    sequences: int
    tokens: int
    left_out: dict[str, str]
    failures: int


class Job:
    """The files of a job at `place`, a directory or a URL. Opening creates nothing.

    Methods raise RefscoreError if the place cannot be read or written.
    """

    def __init__(self, place: str) -> None:
        import fsspec

        self.place = place.rstrip("/")
        try:
            self._files, self._root = fsspec.url_to_fs(self.place)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{place}: {error} (for s3:// install refscore with the extra 's3')") from None
        # a local file is not made whole by writing it, and has no other form of a condition
        self._local = "file" in self._files.protocol

    def begin(self, reference_id: str, **facts: Any) -> None:
        """Make the job; `facts` stand in its plan too. Raises ConfigError if one is there."""
        if self._local and Path(self._root).is_file():
            raise ConfigError(
                f"{self.place} is a file: a job is a directory, so name one that does not exist yet, or a URL"
            )
        for name in ("missing", "claims", "done", "starts", "ready"):
            with self._explaining():
                self._files.makedirs(f"{self._root}/{name}", exist_ok=True)
        if not self.put_new(PLAN, {"reference_id": reference_id, **facts}):
            raise ConfigError(
                f"{self.place} holds a job already: score it with 'refscore score-missing', remove it, or name another place"
            )

    def add(self, number: int, shard: pa.Table) -> None:
        """Add a group; whoever looks finds it whole or not at all."""
        sink = pa.BufferOutputStream()
        with parquet_writer(sink, MISSING, {"tokens": tokens_in(shard)}) as writer:
            writer.write_table(shard, row_group_size=max(1, len(shard)))
        self._put(f"missing/{self.group(number)}.parquet", sink.getvalue().to_pybytes())

    def complete(self, groups: int) -> None:
        """No further group comes."""
        self.put_new(COMPLETE, {"groups": groups})

    def withdraw(self) -> None:
        """No further group comes, and that could not be written: nobody is to wait for one."""
        with suppress(RefscoreError), self._explaining():
            self._files.rm_file(f"{self._root}/{PLAN}")

    def withdrawn(self) -> bool:
        """Whether it was withdrawn, or removed."""
        with self._explaining():
            self._files.invalidate_cache()
            return not self._files.exists(f"{self._root}/{PLAN}")

    def group(self, number: int) -> str:
        """A group's name."""
        return f"{number:08}"

    def has(self, number: int) -> bool:
        """Whether a group was added."""
        with self._explaining():
            self._files.invalidate_cache()
            return bool(self._files.exists(f"{self._root}/missing/{self.group(number)}.parquet"))

    def reference_id(self) -> str:
        """Whose scores are computed. Raises DataError if there is no job."""
        try:
            return str(self.read(PLAN)["reference_id"])
        except (FileNotFoundError, KeyError):
            raise DataError(
                f"{self.place} holds no job: 'refscore precompute --plan-to {self.place}' writes one"
            ) from None

    def store(self) -> str | None:
        """The store that its plan was made against, if it says so."""
        try:
            return str(self.read(PLAN)["store"])
        except (FileNotFoundError, KeyError):
            return None

    def groups(self) -> int | None:
        """How many groups there are; None while more may come."""
        try:
            return int(self.read(COMPLETE)["groups"])
        except (FileNotFoundError, KeyError, TypeError, ValueError):
            return None

    def missing(self, group: str) -> pa.Table:
        """The rows of a group. Raises DataError if its file is damaged."""
        with self._explaining(), self._files.open(f"{self._root}/missing/{group}.parquet", "rb") as file:
            try:
                return pq.read_table(file, schema=MISSING, page_checksum_verification=True)
            except pa.ArrowException as error:
                raise DataError(
                    f"{self.place}/missing/{group}.parquet is damaged ({first_line(error)}): write the job anew, with 'refscore "
                    "precompute --plan-to' and another place; what was published before stays"
                ) from None

    def names(self, folder: str) -> list[str]:
        """Names of files in one of the job's folders, without what follows the last dot, in order."""
        with self._explaining():
            self._files.invalidate_cache()
            try:
                paths = self._files.ls(f"{self._root}/{folder}", detail=False)
            except FileNotFoundError:
                return []
        return sorted(str(path).rsplit("/", 1)[-1].rpartition(".")[0] for path in paths)

    def read(self, name: str) -> dict[str, Any]:
        """The content of a file of the job; empty if it is damaged. Raises FileNotFoundError."""
        content = None
        with self._explaining(), suppress(FileNotFoundError):
            content = self._files.cat_file(f"{self._root}/{name}")
        if content is None:
            raise FileNotFoundError(f"{self.place}/{name}")
        try:
            read = json.loads(content)
        except ValueError:
            return {}
        return read if isinstance(read, dict) else {}

    def put_new(self, name: str, content: dict[str, Any]) -> bool:
        """Write a file that must not exist yet; whether it did not."""
        path, text = f"{self._root}/{name}", json.dumps(content).encode()
        with self._explaining():
            if self._local:
                with self._written(text) as temporary:
                    return durable.link_new(temporary, Path(path))
            try:
                self._files.pipe_file(path, text, mode="create")
            except FileExistsError:
                return False
            except NotImplementedError:
                # a place without conditional writes: two that take a group at one moment score it twice, and one of both counts
                self._files.invalidate_cache()
                if self._files.exists(path):
                    return False
                self._files.pipe_file(path, text)
        return True

    def put(self, name: str, content: dict[str, Any]) -> None:
        """Write a file that is this process's own."""
        self._put(name, json.dumps(content).encode())

    def finish(self, group: str, result: Result) -> Result:
        """Record what came of a group; returns what is recorded, which another process may have done before."""
        return result if self.put_new(f"done/{group}.json", asdict(result)) else self.result(group) or result

    def result(self, group: str) -> Result | None:
        """What came of a group; None if that is not known yet."""
        try:
            return Result(**self.read(f"done/{group}.json"))
        except (FileNotFoundError, TypeError):
            return None

    def remove(self) -> None:
        """Remove the job."""
        with self._explaining():
            self._files.rm(self._root, recursive=True)

    def _put(self, name: str, content: bytes) -> None:
        path = f"{self._root}/{name}"
        with self._explaining():
            if self._local:
                with self._written(content) as temporary:
                    temporary.replace(path)
            else:
                self._files.pipe_file(path, content)

    @contextmanager
    def _written(self, content: bytes) -> Iterator[Path]:
        """A file with the content, where nobody looks; it is gone afterwards."""
        temporary = durable.temporary_beside(Path(self._root) / "file")
        try:
            temporary.write_bytes(content)
            yield temporary
        finally:
            with suppress(OSError):
                temporary.unlink()

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except RefscoreError:
            raise
        except Exception as error:  # noqa: BLE001  # each backend of fsspec has errors of its own
            raise RefscoreError(
                f"{self.place} cannot be read or written ({first_line(error)}): check the place, your rights and the network; what "
                "was published before stays, and the same command goes on from there"
            ) from None
