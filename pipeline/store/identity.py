"""Who computed a score and of what: `reference_id` and `key`.

`reference_id` is a digest of the tensors that are loaded, what config.json says that moves a logit, code that comes with the
model, an adapter, and the numerics; never of a name. `key` is a digest of the reference and of token ids with the boundary
between prompt and response. Token ids already contain tokenizer, chat template, system prompt and truncation, so nothing else
needs hashing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.artifacts.digests import json_sha256
from pipeline.errors import DataError
from pipeline.models.identity import VERSION, ModelIdentity, identify_model


@dataclass(frozen=True)
class Numerics:
    """How the numbers are computed; everything in here changes the reference's identity."""

    engine: str
    engine_version: str
    device: str
    dtype: str
    logits_dtype: str
    quantization: str = "none"
    # named if they differ from what the fields above say: products of attention, arguments of the engine as JSON, and how
    # values per token are kept, if not as float32
    attention: str = ""
    engine_args: str = ""
    logps: str = ""
    # of scores that others computed: who, as the importer says, and whether that was checked
    imported_by: str = ""
    verified: str = ""

    @property
    def words(self) -> str:
        """What computed the numbers, for people."""
        return numerics_in_words(vars(self))

    def described(self) -> dict[str, str]:
        """The fields, but for those that name nothing: what was scored before they existed keeps its identity."""
        return {name: value for name, value in vars(self).items() if value or name not in _NAMED_IF_OTHER}


_NAMED_IF_OTHER = ("attention", "engine_args", "logps", "imported_by", "verified")
IMPORTED = "imported"
UNKNOWN = "unknown"


def imported_numerics(by: str, dtype: str) -> Numerics:
    """Those of scores that `by` computed, as the importer says: nothing of it was checked, and what is not said is unknown."""
    unknown = dict.fromkeys(("engine_version", "device", "logits_dtype", "quantization"), UNKNOWN)
    return Numerics(engine=IMPORTED, dtype=dtype, imported_by=by, verified="no", **unknown)


def numerics_in_words(described: Mapping[str, object]) -> str:
    """The numerics of a reference.json, of this version or another, for people."""
    engine, version, dtype, device = (
        described.get(name, "?") for name in ("engine", "engine_version", "dtype", "device")
    )
    if engine == IMPORTED:
        return f"imported by {described.get('imported_by', '?')}, unverified, dtype {dtype}"
    rounded = ", logps in fixed point" if described.get("logps") else ""
    return f"{engine} {version}, {dtype} on {device}{rounded}"


@dataclass(frozen=True)
class ReferenceIdentity:
    """A model, and how its numbers are computed."""

    model: ModelIdentity
    numerics: Numerics

    @property
    def reference_id(self) -> str:
        """sha256 (hex) of the canonical JSON of `described`."""
        return json_sha256(self.described())

    def described(self) -> dict[str, Any]:
        """The content of reference.json."""
        return {**self.model.described(), "numerics": self.numerics.described()}

    @classmethod
    def from_described(cls, content: dict[str, Any]) -> ReferenceIdentity:
        """The inverse of `described`. Raises DataError for what another version wrote, or nobody."""
        if content.get("version") != VERSION:
            raise DataError(
                f"a reference.json of version {content.get('version')}, this refscore writes and reads version {VERSION}: "
                "what it describes is scored again, under an identity of its own"
            )
        try:
            described = (
                content["weights"],
                content["architecture"],
                content.get("adapter", {}),
                content.get("code", {}),
            )
            return cls(ModelIdentity(*described), Numerics(**content["numerics"]))
        except (KeyError, TypeError):
            raise DataError("a reference.json that describes no reference: remove it, it is written anew") from None


def identify(
    directory: Path, numerics: Numerics, adapter: Path | None = None, *, trusts_code: bool = False
) -> ReferenceIdentity:
    """The identity of the model at `directory` under `numerics`; see `pipeline.models.identity.identify_model`."""
    return ReferenceIdentity(identify_model(directory, adapter, trusts_code=trusts_code), numerics)


def score_key(
    reference_id: str, prompt_ids: Sequence[int] | np.ndarray, response_ids: Sequence[int] | np.ndarray
) -> bytes:
    """The 32 bytes under which the logps of `response_ids` after `prompt_ids` are stored.

    sha256 of: "refscore-key", version (u8), reference_id (32 bytes), and both id lists, each as its length (u64) and
    its ids (i32), all little-endian.
    """
    state = hashlib.sha256(b"refscore-key" + bytes([VERSION]) + bytes.fromhex(reference_id))
    for ids in (prompt_ids, response_ids):
        array = np.asarray(ids, dtype="<i4")
        state.update(len(array).to_bytes(8, "little"))
        state.update(array.tobytes())
    return state.digest()


def keys_of(reference_id: str, table: pa.Table) -> pa.FixedSizeBinaryArray:
    """`score_key` of the sequences of a table's rows, chosen then rejected of each pair; null if there are no token ids.

    Prompts alone have none.
    """
    names = [name for name in ("chosen_ids", "rejected_ids", "response_ids") if name in table.column_names]
    begun = hashlib.sha256(b"refscore-key" + bytes([VERSION]) + bytes.fromhex(reference_id))
    keys: list[bytes | None] = []
    for prompt, *responses in zip(*(_counted(table[name]) for name in ("prompt_ids", *names)), strict=True):
        read = begun.copy()
        read.update(prompt or b"")
        for response in responses:
            state = read.copy()
            state.update(response or b"")
            keys.append(None if response is None else state.digest())
    return pa.array(keys, pa.binary(32))


def _counted(column: pa.ChunkedArray) -> Iterator[bytes | None]:
    """Each list of token ids as it enters a key: its length, and its ids."""
    for chunk in column.chunks:
        values = np.asarray(chunk.values).astype("<i4", copy=False).view(np.uint8).data
        ends = chunk.offsets.to_pylist()
        for there, begin, end in zip(chunk.is_valid().to_pylist(), ends, ends[1:], strict=False):
            yield (end - begin).to_bytes(8, "little") + values[4 * begin : 4 * end] if there else None
