"""The tensors that a model directory's weights are, whatever files they lie in, and a digest of each.

Owns which files are loaded: the index if there is one, else `model.safetensors`. Refuses what engines would read differently.
A tensor's digest is of dtype, shape and bytes; its name is the key. How tensors are spread over files, their order, the
files' names and headers are in no digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.artifacts import durable
from pipeline.artifacts.digests import file_stamp, unchanged_stamp
from pipeline.errors import ConfigError, RefscoreError
from pipeline.models.configuration import ties_embeddings

MEMORY = Path("data/cache/tensors")

_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"
_BLOCK = 8 * 2**20
# safetensors itself reads no header above 100 MB
_LONGEST_HEADER = 100_000_000
_HEADS = ("lm_head.weight", "embed_out.weight")


def loaded_files(directory: Path) -> list[Path]:
    """The safetensors files that engines load from a model directory.

    Raises ConfigError for an index that names files which are not there, and for an index beside a `model.safetensors` that it
    does not name: transformers would load the one, vLLM the other.
    """
    index, whole = directory / _INDEX, directory / _WHOLE
    if not index.is_file():
        return [whole] if whole.is_file() else sorted(directory.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{index} is no index of weights: fetch the model again, or save it anew") from None
    absent = [name for name in names if Path(name).name != name or not (directory / name).is_file()]
    if absent:
        raise ConfigError(f"{index} names {', '.join(absent)}, which {directory} does not hold: fetch the model again")
    if whole.is_file() and names != [_WHOLE]:
        raise ConfigError(
            f"{directory} holds two sets of weights, {_WHOLE} and those that {_INDEX} names: transformers would load the "
            "former, vLLM the latter. Move one of them away"
        )
    return [directory / name for name in names]


def unloaded_files(directory: Path) -> list[Path]:
    """Safetensors files in the directory that are not loaded."""
    return sorted(set(directory.glob("*.safetensors")) - set(loaded_files(directory)))


def unread_bytes(directory: Path) -> int:
    """Bytes that `tensor_digests` would have to read."""
    return sum(file.stat().st_size for file in loaded_files(directory) if _recall(file_stamp(file)) is None)


def tensor_digests(directory: Path, on_bytes: Callable[[int], None] = lambda _: None) -> dict[str, str]:
    """sha256 (hex) of dtype, shape and bytes of every tensor that is loaded from a model directory, by name.

    An output layer that is tied to the embeddings and saved beside them counts once. `on_bytes` hears of every block that was
    read. Raises ConfigError for files that are no safetensors, and for a tensor that stands in two of them.
    """
    digests = digests_of_files(loaded_files(directory), on_bytes)
    copies = _copies_of_embeddings(digests)
    if copies and ties_embeddings(directory):
        return {name: digest for name, digest in digests.items() if name not in copies}
    return digests


def digests_of_files(files: list[Path], on_bytes: Callable[[int], None] = lambda _: None) -> dict[str, str]:
    """Digests of all tensors in `files`, read in parallel and remembered per file."""
    with ThreadPoolExecutor() as pool:
        parts = list(pool.map(lambda file: _digests_of_file(file, on_bytes), files))
    digests: dict[str, str] = {}
    for file, part in zip(files, parts, strict=True):
        if twice := sorted(digests.keys() & part.keys()):
            raise ConfigError(f"{file} holds {twice[0]}, which another file beside it holds too: remove one of them")
        digests |= part
    return dict(sorted(digests.items()))


def _copies_of_embeddings(digests: dict[str, str]) -> set[str]:
    others = {digest for name, digest in digests.items() if not name.endswith(_HEADS)}
    return {name for name, digest in digests.items() if name.endswith(_HEADS) and digest in others}


def _digests_of_file(file: Path, on_bytes: Callable[[int], None]) -> dict[str, str]:
    stamp = file_stamp(file)
    remembered = _recall(stamp)
    if remembered is not None:
        return remembered
    with file.open("rb") as content:
        size = file.stat().st_size
        header, start = _header(file, content, size)
        digests = {}
        for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, end = about["data_offsets"]
            state = hashlib.sha256(json.dumps([about["dtype"], about["shape"]]).encode())
            content.seek(start + first)
            left = end - first
            while left and (block := content.read(min(_BLOCK, left))):
                state.update(block)
                on_bytes(len(block))
                left -= len(block)
            if left:
                raise ConfigError(f"{file} ends within {name}: fetch it again")
            digests[name] = state.hexdigest()
    _keep(unchanged_stamp(file, stamp), digests)
    return digests


def _header(file: Path, content: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """What stands in a safetensors file, by name, and where the data begins."""
    length = int.from_bytes(content.read(8), "little")
    try:
        if not 0 < length <= min(size - 8, _LONGEST_HEADER):
            raise ValueError(length)
        header = json.loads(content.read(length))
        header.pop("__metadata__", None)
        for about in header.values():
            first, end = about["data_offsets"]
            if not (isinstance(about["dtype"], str) and isinstance(about["shape"], list) and 0 <= first <= end):
                raise ValueError(about)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{file} is no safetensors file: fetch it again, or save the model anew") from None
    return header, 8 + length


def _recall(stamp: str | None) -> dict[str, str] | None:
    if stamp is None:
        return None
    try:
        content = json.loads(_place(stamp).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("stamp") != stamp or not isinstance(content.get("tensors"), dict):
        return None
    return dict(content["tensors"])


def _keep(stamp: str | None, digests: dict[str, str]) -> None:
    # only a memory: a place that cannot be written costs time, not correctness
    if stamp is not None:
        with contextlib.suppress(RefscoreError, OSError):
            durable.write_json(_place(stamp), {"stamp": stamp, "tensors": digests})


def _place(stamp: str) -> Path:
    return MEMORY / f"{hashlib.sha256(stamp.encode()).hexdigest()[:40]}.json"
