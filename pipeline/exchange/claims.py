"""What somebody says of a response: token ids, the sum of its log-probabilities, their values if they are known; and what cannot
be true of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# by how much two sums of one response may differ as batches differ: nats per token, noise of single tokens, and what rounding a sum
# takes. Of a dtype that is not known, as of half precision
_NOISE = {"float32": (1e-3, 0.0, 1e-6), "half": (0.02, 0.1, 2**-8)}


@dataclass(frozen=True)
class Claim:
    """What a file says of one response: float64 sum in nats, and float32 values per token if it has them."""

    prompt_ids: list[int]
    response_ids: list[int]
    logp: float
    logps: np.ndarray | None = None


@dataclass(frozen=True)
class ClaimedPair:
    """The claims of one row, chosen and rejected; none, and why, if one of them cannot be true."""

    source: str
    row: int
    claims: tuple[Claim, ...]
    reason: str = ""


@dataclass(frozen=True)
class Claimed:
    """The reference that scores are claimed to be of: how many token ids it knows, the dtype that is said, and for forms of text
    the tokenizer and whether prompts begin with its begin token.
    """

    vocabulary: int
    dtype: str
    tokenizer: PreTrainedTokenizerBase
    begins: bool


class Unusable(Exception):
    """Why a row's claims cannot be true."""


def noise(tokens: np.ndarray, sums: np.ndarray, dtype: str) -> np.ndarray:
    """By how much two honest sums of the same responses, computed in `dtype`, may differ, in nats."""
    bias, spread, rounding = _NOISE["float32" if dtype == "float32" else "half"]
    allowed: np.ndarray = bias * tokens + spread * np.sqrt(tokens) + rounding * np.abs(sums)
    return allowed


def claim_of(prompt: Any, response: Any, logp: Any, claimed: Claimed, logps: Any = None) -> Claim:
    """The claim that these values make. Raises Unusable if it cannot be true, DataError for ids of another vocabulary."""
    for ids in (prompt, response):
        _must_be_ids(ids, claimed.vocabulary)
    if logps is not None:
        values, total = _values(logps, len(response))
        if logp is not None and not abs(_number(logp) - total) <= noise(
            np.array(len(response)), np.array(total), claimed.dtype
        ):
            raise Unusable("with a sum that is not that of its values per token")
        return Claim(prompt, response, total, values)
    number = _number(logp)
    if not np.isfinite(number):
        raise Unusable("with a score that is not finite")
    if number > 0:
        raise Unusable("with a score above 0, which is no log-probability")
    return Claim(prompt, response, number)


def _must_be_ids(ids: Any, vocabulary: int) -> None:
    if not isinstance(ids, list) or not ids:
        raise Unusable("without token ids of prompt or response")
    if set(map(type, ids)) != {int}:
        raise Unusable("with token ids that are no whole numbers")
    outside = next((token for token in (min(ids), max(ids)) if not 0 <= token < vocabulary), None)
    if outside is not None:
        raise DataError(
            f"token id {str(outside)[:40]} is not in the reference's vocabulary of {vocabulary}: these scores are of a model with "
            "another tokenizer. Set reference.model to the model that was scored"
        )


def _values(logps: Any, tokens: int) -> tuple[np.ndarray, float]:
    if not isinstance(logps, list) or len(logps) != tokens:
        raise Unusable("with another number of values than tokens")
    numbers = np.array([_number(value) for value in logps], np.float64)
    with np.errstate(over="ignore"):
        values = numbers.astype(np.float32)
    if not np.isfinite(values).all():
        raise Unusable("with a score that is not finite")
    if (values > 0).any():
        raise Unusable("with a score above 0, which is no log-probability")
    return values, float(values.sum(dtype=np.float64))


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unusable("without a score" if value is None else "with a score that is no number")
    try:
        return float(value)
    except OverflowError:
        raise Unusable("with a score that is not finite") from None
