"""Files at a URL that fsspec reaches (`s3://...`), as far as reading asks of a path. They are read where they lie, by ranges."""

from __future__ import annotations

import hashlib
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.errors import ConfigError, DataError, first_line

PATTERN = re.compile(r"[*?\[]")
# bytes that are asked for at once
_AT_ONCE = 4 * 2**20


@dataclass(frozen=True)
class RemoteFile:
    """One object: its URL, its size in bytes, and what its place says that its content is known by, if anything."""

    url: str
    size: int = field(compare=False)
    tag: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """Its last part."""
        return PurePosixPath(self.url).name

    @property
    def stem(self) -> str:
        """Its name without its ending."""
        return PurePosixPath(self.url).stem

    @property
    def suffix(self) -> str:
        """Its ending."""
        return PurePosixPath(self.url).suffix

    @property
    def suffixes(self) -> list[str]:
        """Its endings."""
        return PurePosixPath(self.url).suffixes

    def with_suffix(self, suffix: str) -> PurePosixPath:
        """Its name with another ending."""
        return PurePosixPath(self.name).with_suffix(suffix)

    def open(self, _: str = "rb") -> io.BufferedReader:
        """Its bytes, which can be read from anywhere."""
        files, path = _reached(self.url)
        return io.BufferedReader(files.open(path, "rb", block_size=_AT_ONCE), _AT_ONCE)

    def again(self) -> RemoteFile:
        """The object as it is now. Raises FileNotFoundError if it is gone, DataError if it cannot be reached."""
        files, path = _reached(self.url)
        return _file(files, path, _info(files, path))

    def state(self) -> str:
        """What its place says of it, asked now if it gives it no tag. Raises as `again` does."""
        return f"{self.size} {self.tag}" if self.tag else str(_info(*_reached(self.url)))

    def digest(self) -> str:
        """sha256 of URL, size and tag; of its bytes if its place gives it no tag. Raises DataError if it cannot be read."""
        if self.tag:
            return hashlib.sha256(json.dumps([self.url, self.size, self.tag]).encode()).hexdigest()
        try:
            with self.open() as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except Exception as error:  # noqa: BLE001  # credentials, network, rights: each backend has errors of its own
            raise unreadable(self.url, error) from None


File = Path | RemoteFile


def is_url(name: str) -> bool:
    """Whether a source's name is a URL."""
    return "://" in name


def remote_files(name: str) -> tuple[list[RemoteFile], str | None]:
    """The files that a URL leads to, by name, and the folder that they are all files of, if it is one.

    A name with * ? or [ is a pattern. Raises ConfigError if nothing reads such URLs, DataError if there is nothing or it cannot be
    reached.
    """
    files, root = _reached(name)
    try:
        files.invalidate_cache()
        if PATTERN.search(name):
            found = {path: info for path, info in files.glob(root, detail=True).items() if info["type"] == "file"}
            folder = None
        else:
            found = files.find(root, detail=True)
            folder = None if list(found) == [root] else str(files.unstrip_protocol(root)).rstrip("/")
    except FileNotFoundError:
        found = {}
    except Exception as error:  # noqa: BLE001  # likewise
        raise unreadable(name, error) from None
    if not found:
        raise DataError(f"{name}: no such file, folder or pattern of files there")
    return [_file(files, path, info) for path, info in sorted(found.items())], folder


def unreadable(name: str, error: Exception) -> DataError:
    """What is said of a URL that does not answer, or not with what was asked for."""
    return DataError(
        f"{name} cannot be read ({first_line(error)}): check the URL, the network and the credentials in the environment"
    )


def _file(files: Any, path: str, listed: dict[str, Any]) -> RemoteFile:
    # what lists files need not say more of them
    info = listed if listed.get("size") is not None else _info(files, path)
    url, size, tag = files.unstrip_protocol(path), info.get("size"), info.get("ETag") or info.get("etag")
    if size is None:
        raise DataError(
            f"{url}: its server does not say how large it is: copy it to a file, and give data.path its name"
        )
    return RemoteFile(url, int(size), str(tag) if tag else None)


def _info(files: Any, path: str) -> dict[str, Any]:
    """What a place says of an object now."""
    try:
        files.invalidate_cache()
        info: dict[str, Any] = files.info(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # noqa: BLE001  # likewise
        raise unreadable(files.unstrip_protocol(path), error) from None
    return info


def _reached(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        reached: tuple[Any, str] = fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"data.path {url}: {first_line(error)} (for s3:// install refscore with the extra 's3')"
        ) from None
    except Exception as error:  # noqa: BLE001  # some backends connect here
        raise unreadable(url, error) from None
    return reached
