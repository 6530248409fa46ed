"""vLLM's two model runners, asked for the log-probabilities of responses; what they leave out is found and asked again.

Responses to one prompt share its keys and values through vLLM's prefix cache. For tokens taken from the cache vLLM computes
no log-probabilities: the V1 runner returns uninitialised memory in their place, the V2 runner returns None. So scores start
as NaN, only rows from `num_cached_tokens` on are taken, what siblings share is copied, and what is left is scored again
without the cache. Nothing that is NaN leaves here; what was computed and is no number leaves as -inf
(`pipeline.engines.quarantine`).

Row i of a sequence predicts its token i + 1: row len(prompt) - 1 predicts the first token of the response.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.engines.protocol import Request, TopTokens
from pipeline.engines.quarantine import computed
from pipeline.engines.sharing import Branch, branches_of, copy_shared, siblings
from pipeline.errors import CheckError
from pipeline.hardware import device_kind

if TYPE_CHECKING:
    from vllm import LLM

log = logging.getLogger(__name__)

# ids per row that vLLM answers unless it is started with another max_logprobs
_COLUMNS = 20


class Runner(Protocol):
    """How one of vLLM's model runners is asked for response rows."""

    def read(self, sequences: Sequence[Request], scores: list[np.ndarray], *, shared: bool) -> None:
        """Write what was computed into `scores` (NaN elsewhere); with `shared` the prefix cache is read."""
        ...


def score_with(runner: Runner, sequences: Sequence[Request], *, shared: bool) -> list[np.ndarray]:
    """Logps of every sequence's response, each value computed for exactly its ids.

    Raises CheckError if the engine leaves a value out although the cache was not read.
    """
    scores = [np.full(len(item.response_ids), np.nan, np.float32) for item in sequences]
    runner.read(sequences, scores, shared=shared)
    if shared:
        copy_shared(sequences, scores)
        left = [position for position, values in enumerate(scores) if np.isnan(values).any()]
        if left:
            log.debug(
                "%d of %d sequences are read again: the cache held more than their prompt", len(left), len(scores)
            )
            again = [np.full_like(scores[position], np.nan) for position in left]
            runner.read([sequences[position] for position in left], again, shared=False)
            for position, values in zip(left, again, strict=True):
                scores[position] = values
    for item, values in zip(sequences, scores, strict=True):
        if np.isnan(values).any():
            raise CheckError(
                f"vLLM computed {int(np.isfinite(values).sum())} of {len(values)} log-probabilities of a response "
                f"(prompt of {len(item.prompt_ids)} tokens)"
            )
    return scores


def top_with(llm: Any, sequences: Sequence[Request], count: int) -> list[TopTokens]:
    """The `count` likeliest tokens at every position of each response; the engine must answer so many columns (max_logprobs)."""
    prompts = [[*item.prompt_ids, *item.response_ids] for item in sequences]
    params = [_params(prompt_logprobs=count, shared=False) for _ in sequences]
    outputs = _generate(llm, prompts, params)
    return [_top_of(item, output.prompt_logprobs, count) for item, output in zip(sequences, outputs, strict=True)]


def runner_of(llm: LLM) -> Runner:
    """The runner for this engine: response rows only if it can, by what it offers and not by its version."""
    from vllm import SamplingParams

    config = llm.llm_engine.vllm_config
    if hasattr(SamplingParams, "prompt_logprob_token_ids") and getattr(config, "use_v2_model_runner", False):
        return RowsRunner(llm)
    return FlatRunner(llm, config.cache_config.block_size)


def response_rows_are_likely() -> bool:
    """Whether an engine that is started here will probably run the V2 runner; `runner_of` knows once it has been started."""
    from vllm import SamplingParams

    asked = os.environ.get("VLLM_USE_V2_MODEL_RUNNER")
    return device_kind() != "cpu" and hasattr(SamplingParams, "prompt_logprob_token_ids") and asked != "0"


class FlatRunner:
    """V1 runner: log-probabilities of all computed tokens, flat.

    To keep the prompt's tokens away from the output layer, and to share them, the prompt's whole blocks are sent first as
    a request of their own that asks for nothing. A request's blocks are found by those that follow it in the queue, also
    within the same step.
    """

    def __init__(self, llm: Any, block_size: int) -> None:
        self._llm, self._block = llm, block_size

    def __str__(self) -> str:
        return "V1 runner, flat log-probabilities"

    def read(self, sequences: Sequence[Request], scores: list[np.ndarray], *, shared: bool) -> None:
        """See `Runner.read`."""
        prompts: list[list[int]] = []
        asked: list[int | None] = []
        for group in siblings(sequences):
            prompt = list(sequences[group[0]].prompt_ids)
            # without the last token: the row that predicts the response must be computed
            trunk = (len(prompt) - 1) // self._block * self._block
            if shared and trunk:
                prompts.append(prompt[:trunk])
                asked.append(None)
            for position in group:
                prompts.append([*prompt, *sequences[position].response_ids])
                asked.append(position)
        params = [_params(prompt_logprobs=None if position is None else 0, shared=shared) for position in asked]
        for read, output in zip(asked, _generate(self._llm, prompts, params), strict=True):
            if read is not None:
                _take_flat(sequences[read], output, scores[read])


class RowsRunner:
    """V2 runner: exactly the response's rows, for ids of our choice.

    A branch is asked from the token after the one at which it leaves its parent; that token's score is one more column of
    the parent's row. So the cache, which holds at most what both share, never covers a row that is asked for.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def __str__(self) -> str:
        return "V2 runner, response rows only"

    def read(self, sequences: Sequence[Request], scores: list[np.ndarray], *, shared: bool) -> None:
        """See `Runner.read`."""
        if shared:
            tries = [branches_of(sequences, group, _COLUMNS - 1) for group in siblings(sequences)]
        else:
            tries = [[Branch(position, None, 0)] for position in range(len(sequences))]
        branches = [branch for trie in tries for branch in trie]
        leaving: dict[tuple[int, int], list[int]] = {}
        for branch in branches:
            if branch.parent is not None and branch.depth < len(sequences[branch.position].response_ids):
                leaving.setdefault((branch.parent, branch.depth), []).append(branch.position)
        asked = {branch.position: _rows_asked(branch, sequences, leaving) for branch in branches}
        sent = [branch for branch in branches if len(asked[branch.position])]
        prompts = [
            [*sequences[branch.position].prompt_ids, *sequences[branch.position].response_ids] for branch in sent
        ]
        params = [
            _params(
                prompt_logprob_token_ids=asked[branch.position],
                prompt_logprob_start=len(sequences[branch.position].prompt_ids) - 1 + _first(branch),
                shared=shared,
            )
            for branch in sent
        ]
        rows = {
            branch.position: _checked_rows(output, asked[branch.position])
            for branch, output in zip(sent, _generate(self._llm, prompts, params), strict=True)
        }
        first = {branch.position: _first(branch) for branch in branches}
        for branch in branches:
            values = scores[branch.position]
            if (own := rows.get(branch.position)) is not None:
                values[first[branch.position] :] = own[:, 0]
            if branch.parent is not None:
                values[: branch.depth] = scores[branch.parent][: branch.depth]
                theirs = rows.get(branch.parent)
                if theirs is not None and branch.depth < len(values):
                    column = 1 + leaving[branch.parent, branch.depth].index(branch.position)
                    values[branch.depth] = theirs[branch.depth - first[branch.parent], column]


def _first(branch: Branch) -> int:
    """The first response token whose score the branch asks for itself."""
    return 0 if branch.parent is None else branch.depth + 1


def _rows_asked(branch: Branch, sequences: Sequence[Request], leaving: dict[tuple[int, int], list[int]]) -> np.ndarray:
    """Ids to score, [rows, columns]: column 0 the branch's own, then those of the branches that leave it there."""
    first = _first(branch)
    own = np.asarray(sequences[branch.position].response_ids[first:], dtype=np.int32)
    others = {row: leaving.get((branch.position, first + row), []) for row in range(len(own))}
    ids = np.full((len(own), 1 + max(map(len, others.values()), default=0)), -1, dtype=np.int32)
    ids[:, 0] = own
    for row, children in others.items():
        ids[row, 1 : 1 + len(children)] = [sequences[child].response_ids[first + row] for child in children]
    return ids


def _params(*, shared: bool, **asked: Any) -> Any:
    from vllm import SamplingParams

    # one token must be sampled (vLLM refuses zero); it is thrown away
    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        detokenize=False,
        flat_logprobs=True,
        skip_reading_prefix_cache=not shared,
        **asked,
    )


def _generate(llm: Any, prompts: list[list[int]], params: list[Any]) -> list[Any]:
    import torch
    from vllm import TokensPrompt

    # ranks, which nobody asked for, would be computed by a function that takes seconds to compile
    with torch.compiler.set_stance("force_eager") if device_kind() == "cpu" else nullcontext():
        outputs: list[Any] = llm.generate(
            [TokensPrompt(prompt_token_ids=ids) for ids in prompts], params, use_tqdm=False
        )
    if len(outputs) != len(prompts):
        raise CheckError(f"vLLM answered {len(outputs)} of {len(prompts)} requests")
    return outputs


def _take_flat(item: Request, output: Any, values: np.ndarray) -> None:
    # one entry per position from 1 on (position 0 has no predecessor); entry 0 of each is the token itself
    flat, start = output.prompt_logprobs, len(item.prompt_ids)
    if flat is None or len(flat) != len(item):
        raise CheckError(f"vLLM returned {len(flat or ())} positions for a sequence of {len(item)}")
    if output.num_cached_tokens is None:
        raise CheckError("vLLM does not say how much of a sequence came from its cache, so no score can be trusted")
    # rows below num_cached_tokens were not computed: what stands there is uninitialised memory
    skip = max(0, output.num_cached_tokens - (start - 1))
    asked = list(item.response_ids[skip:])
    if not asked:
        return
    begin, end = flat.start_indices[start + skip], flat.end_indices[-1]
    if end - begin != len(asked) or list(flat.token_ids[begin:end]) != asked:
        raise CheckError("vLLM returned log-probabilities of other token ids than were asked")
    values[skip:] = computed(np.asarray(flat.logprobs[begin:end]))


def _top_of(item: Request, flat: Any, count: int) -> TopTokens:
    # a position has its own token first, then the likeliest, which may be that token again
    if flat is None or len(flat) != len(item):
        raise CheckError(f"vLLM returned {len(flat or ())} positions for a sequence of {len(item)}")
    begin, end, tokens = flat.start_indices[len(item.prompt_ids)], flat.end_indices[-1], len(item.response_ids)
    if end - begin != tokens * (count + 1):
        raise CheckError(
            f"vLLM returned {end - begin} log-probabilities for {tokens} positions of {count} tokens and their own"
        )
    ids = np.asarray(flat.token_ids[begin:end], dtype=np.int32).reshape(tokens, count + 1)
    logps = np.asarray(flat.logprobs[begin:end], dtype=np.float32).reshape(tokens, count + 1)
    if not np.array_equal(ids[:, 0], np.asarray(item.response_ids, dtype=np.int32)):
        raise CheckError("vLLM returned log-probabilities of other token ids than were asked")
    # false of what is no number, which the caller leaves out by name
    if (logps[:, 2:] > logps[:, 1:-1]).any():
        raise CheckError("vLLM returned likeliest tokens that are out of order")
    return TopTokens(ids[:, 1:], computed(logps[:, 1:]))


def _checked_rows(output: Any, asked: np.ndarray) -> np.ndarray | None:
    # None without a word: the cache covered a row that was asked for, or the request was preempted
    rows = output.prompt_token_id_logprobs
    if rows is None:
        return None
    if rows.shape != asked.shape:
        raise CheckError(f"vLLM returned rows of the shape {rows.shape}, {asked.shape} were asked")
    return computed(np.asarray(rows))
