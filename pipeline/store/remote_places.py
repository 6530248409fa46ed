"""Shards at a place that fsspec reaches (`s3://...`): fetched once into a local cache under their digest, checked there.

Objects are published by put-if-absent, if the place knows that. A damaged object is fetched no second time by this process,
and the next publication of the same name replaces it.
"""

from __future__ import annotations

import logging
from pathlib import Path

from pipeline.artifacts import durable
from pipeline.artifacts.digests import file_sha256
from pipeline.errors import ConfigError, RefscoreError, first_line
from pipeline.store.places import LocalPlace, Patience, set_aside_if_damaged
from pipeline.store.shard import SHARD, check_shard, digest_in, sha256_now

log = logging.getLogger(__name__)

CACHE = Path("data/cache/shards")


class RemotePlace:
    """A place that fsspec reaches; see `pipeline.store.places.Place`."""

    def __init__(self, url: str, reference_id: str) -> None:
        import fsspec

        self._url = f"{url.rstrip('/')}/{reference_id}"
        try:
            self._files, self._root = fsspec.url_to_fs(self._url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"store {url}: {error} (for s3:// install refscore with the extra 's3')") from None
        except Exception as error:  # noqa: BLE001  # some backends connect here, each with errors of its own
            raise RefscoreError(
                f"store {url} cannot be reached ({first_line(error)}): check the URL, the network and the credentials in the "
                "environment, or leave this place out of reference.store"
            ) from None
        self._cache = CACHE / reference_id
        self._unsound: set[str] = set()

    @property
    def name(self) -> str:
        return self._url

    def shards(self) -> list[Path]:
        """See `Place.shards`; fetches what the local cache lacks. A copy in the cache that is damaged is fetched again."""
        patience = Patience()
        fetched: dict[str, Path] = {}
        while True:
            names = [name for name in self._names() if SHARD.fullmatch(name) and name not in self._unsound]
            try:
                for name in names:
                    if name not in fetched and (local := self._local(name)) is not None:
                        fetched[name] = local
                return [fetched[name] for name in names if name in fetched]
            except _NotFetched as failure:
                # removed since it was listed, by a compaction elsewhere; or listed for ever and not to be had
                patience.again(f"{self._url}/{failure.name}", str(failure))

    def examine(self, shard: Path, problem: str) -> bool:
        """See `Place.examine`: of the copy in the cache, which `shards` fetches anew."""
        try:
            damage = check_shard(shard)
        except FileNotFoundError:
            return False
        if damage is None:
            log.debug("%s: %s, but it is sound when read again", shard, problem)
            return True
        try:
            if sha256_now(shard) == digest_in(shard.name):
                self._unsound.add(shard.name)  # fetching the same bytes again would not help
        except OSError as error:
            log.debug("%s: the copy cannot be read (%s)", shard, first_line(error))
        log.warning("%s: %s; the copy is removed", shard, damage)
        shard.unlink(missing_ok=True)
        return False

    def publish(self, file: Path, name: str) -> None:
        """See `Place.publish`: put-if-absent; an object that has other bytes is replaced."""
        self._put(name, file.read_bytes())
        self._unsound.discard(name)
        durable.reached("publish: linked")
        if SHARD.fullmatch(name):
            LocalPlace(self._cache).publish(file, name)

    def why_not_writable(self) -> str | None:
        """See `Place.why_not_writable`: by writing an empty object, always the same one: some may write and not delete."""
        probe = f"{self._root}/{durable.TEMPORARY}probe"
        try:
            self._files.pipe_file(probe, b"")
        except Exception as error:  # noqa: BLE001  # every fsspec backend has errors of its own
            return f"{self._url}: {first_line(error)}"
        try:
            self._files.rm_file(probe)
        except Exception as error:  # noqa: BLE001  # likewise
            log.debug("%s cannot be removed (%s)", probe, first_line(error))
        return None

    def workspace(self) -> Path:
        """See `Place.workspace`: the local cache."""
        self._cache.mkdir(parents=True, exist_ok=True)
        return self._cache

    def read(self, name: str) -> bytes:
        """See `Place.read`."""
        self._files.invalidate_cache()
        try:
            content: bytes = self._files.cat_file(f"{self._root}/{name}")
        except FileNotFoundError:
            raise
        except Exception as error:  # noqa: BLE001  # credentials, network, rights: each backend has errors of its own
            raise RefscoreError(
                f"{self._url}/{name} cannot be read ({first_line(error)}): check the network and the credentials in the environment"
            ) from None
        return content

    def remove(self, name: str) -> None:
        """See `Place.remove`."""
        try:
            self._files.rm_file(f"{self._root}/{name}")
        except FileNotFoundError:
            return
        except Exception as error:  # noqa: BLE001  # likewise
            raise RefscoreError(
                f"{self._url}/{name} cannot be removed ({first_line(error)}): check the network and your rights"
            ) from None

    def _names(self) -> list[str]:
        try:
            self._files.invalidate_cache()
            return sorted(str(path).rsplit("/", 1)[-1] for path in self._files.ls(self._root, detail=False))
        except FileNotFoundError:
            return []
        except Exception as error:  # noqa: BLE001  # credentials, network, rights: each backend has errors of its own
            raise RefscoreError(
                f"store {self._url} cannot be listed ({first_line(error)}): check the URL, the network and the "
                "credentials in the environment, or leave this place out of reference.store"
            ) from None

    def _local(self, name: str) -> Path | None:
        """The checked copy in the cache, fetched if need be; None for an object whose own bytes are damaged."""
        local = self._cache / name
        try:
            if local.exists() and file_sha256(local) == digest_in(name):
                return local
        except OSError as error:
            log.debug("%s: the copy cannot be read (%s)", local, first_line(error))
        self._fetch(name, local)
        if sha256_now(local) == digest_in(name):
            return local
        self._unsound.add(name)
        log.warning(
            "the object %s/%s has not the bytes that were published: its rows count as not scored", self._url, name
        )
        set_aside_if_damaged(local)
        return None

    def _fetch(self, name: str, local: Path) -> None:
        local.parent.mkdir(parents=True, exist_ok=True)
        with durable.replacing(local) as temporary:
            try:
                self._files.get_file(f"{self._root}/{name}", str(temporary))
            except Exception as error:  # noqa: BLE001  # likewise
                raise _NotFetched(name, error) from None

    def _put(self, name: str, content: bytes) -> None:
        path = f"{self._root}/{name}"
        try:
            try:
                self._files.pipe_file(path, content, mode="create")
                return
            except FileExistsError:
                log.debug("%s was published before", name)
            except NotImplementedError:
                # a backend without conditional writes: the name decides the content, so writing it twice changes nothing
                log.debug("%s knows no put-if-absent", self._url)
            if not self._holds(path, content):
                self._files.pipe_file(path, content)
        except Exception as error:  # noqa: BLE001  # likewise
            raise RefscoreError(
                f"{name} cannot be published to {self._url} ({first_line(error)}); what was published before stays"
            ) from None

    def _holds(self, path: str, content: bytes) -> bool:
        self._files.invalidate_cache()
        try:
            held: bytes = self._files.cat_file(path)
        except FileNotFoundError:
            return False
        if held != content:
            log.warning("%s was damaged: the same content, published again, takes its place", path)
        return held == content


class _NotFetched(Exception):
    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(first_line(error))
        self.name = name
