"""What a file held when it was looked at, and whether it still does: rows are read long after their file was digested."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.artifacts.digests import file_sha256
from pipeline.errors import DataError
from pipeline.pairs.reading.remote import File, RemoteFile


@dataclass(frozen=True)
class Content:
    """A file's content: its `digest`, and the `state` that the file was in just before it was digested."""

    digest: str
    state: str

    @classmethod
    def of(cls, file: File) -> Content:
        """What the file holds now. Raises DataError if it cannot be read."""
        try:
            state = _state_of(file)
            return cls(file.digest() if isinstance(file, RemoteFile) else file_sha256(file), state)
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror})") from None

    def must_be_held(self, file: File, place: File) -> None:
        """Raise DataError if the file, which was read since, holds something else now; messages call it `place`."""
        try:
            now = file.again() if isinstance(file, RemoteFile) else file
            changed = _state_of(now) != self.state and Content.of(now).digest != self.digest
        except FileNotFoundError:
            changed = True
        if changed:
            raise DataError(
                f"{place} changed while it was read: run the same command again once nothing writes to it; what was made of the "
                "other files is kept"
            )


def _state_of(file: File) -> str:
    """What becomes another when the file's content does, and may become another without."""
    if isinstance(file, RemoteFile):
        return file.state()
    status = file.stat()
    return f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
