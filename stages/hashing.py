"""Hashing a model's weights with a bar, where that takes a while; whoever asks for their digests then finds them known."""

from __future__ import annotations

from pipeline.engines.reference import OpenedReference
from pipeline.models.weights import tensor_digests, unread_bytes
from stages import console

_WORTH_A_BAR = 2**30  # bytes: a second or two of reading


def hash_weights(reference: OpenedReference) -> None:
    """Hash weights that were not seen before."""
    base = reference.paths.base
    unread = unread_bytes(base)
    if unread < _WORTH_A_BAR:
        return
    with console.progress("hashing weights, MiB", unread // 2**20) as ticker:
        tensor_digests(base, lambda read: ticker.advance(read // 2**20, ""))
