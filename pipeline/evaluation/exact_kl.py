"""KL between the next-token distributions of two models, exact over the vocabulary, at every position of given responses.

On responses that the first model sampled, the sum over a response's positions has the same mean as the sampled log-ratio and
less variance: at every position the token that was drawn is replaced by the mean over all tokens (Rao-Blackwell; for language
models Amini et al. 2025, arXiv 2504.10637). One model is in memory at a time: the first one's hidden states wait in a
temporary file, its output layer in memory.

Shapes: N positions, n positions of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pipeline.artifacts import durable
from pipeline.engines.protocol import Request
from pipeline.engines.transformers import TOKENS_PER_BATCH, batches, tree_of
from pipeline.errors import ConfigError
from pipeline.evaluation.candidates import Candidate
from pipeline.forward.logps import Hidden, hidden_states_of
from pipeline.forward.output_layer import GPU_LOGITS_BYTES, LOGITS_BYTES, OutputLayer, output_layer_of
from pipeline.forward.trees import Tree, merge
from pipeline.hardware import device_kind, return_freed_memory
from pipeline.models.load import load_causal_lm


@torch.no_grad()
def exact_divergence(
    model: Candidate, baseline: Candidate, requests: Sequence[Request], dtype: str
) -> list[np.ndarray]:
    """For each request, in order, KL(model || baseline) of the distribution that each of its response's tokens was drawn from:
    float32 [tokens of the response], in nats.

    Raises ConfigError if an architecture's output layer is not known, or the two vocabularies have other sizes.
    """
    hidden, layer = _opened(model, dtype)
    parts = batches(requests, TOKENS_PER_BATCH[device_kind()], hidden.tokens)
    positions = sum(len(branch) for part in parts for tree in _merged(requests, part)[0] for branch in tree.branches)
    values = [np.empty(0, np.float32)] * len(requests)
    with tempfile.NamedTemporaryFile(prefix="hidden-", dir=durable.scratch_place()) as file:
        with durable.explaining_disk(Path(file.name)):
            for part in parts:
                hidden.of(_merged(requests, part)[0]).float().cpu().numpy().tofile(file)
            file.flush()
        shape = (positions, layer.weight_VH.shape[1])
        states = np.memmap(file.name, np.float32, "r", shape=shape)
        del hidden
        gc.collect()
        hidden, other = _opened(baseline, dtype)
        _must_be_comparable(model, layer, baseline, other)
        start = 0
        for part in parts:
            trees, places = _merged(requests, part)
            found, start = _of_part(trees, (states, start, layer), (hidden, other))
            for numbers, group in zip(places, part, strict=True):
                for number, position in zip(numbers, group, strict=True):
                    values[position] = found[number]
    del hidden, layer, other
    gc.collect()
    return_freed_memory()
    return values


def position_divergence(
    own_NH: torch.Tensor, own: OutputLayer, other_NH: torch.Tensor, other: OutputLayer
) -> torch.Tensor:
    """KL(p || q) float32 [N] of the distributions that two output layers make of hidden states; logits exist in chunks.

    Summed as p (log p - log q) + q - p, which is no less than 0 token by token and has the same sum.
    """
    most = LOGITS_BYTES if own_NH.device.type == "cpu" else GPU_LOGITS_BYTES
    size = max(1, most // (4 * len(own.weight_VH)))
    values = torch.empty(len(own_NH), device=own_NH.device)
    for rows in _chunks(len(own_NH), size):
        p_nV, q_nV = (layer.logits(states[rows]).log_softmax(1) for layer, states in ((own, own_NH), (other, other_NH)))
        gap_nV = p_nV - q_nV
        p_nV.exp_()
        values[rows] = (p_nV * gap_nV + q_nV.exp_() - p_nV).sum(1)
    return values


def _of_part(
    trees: Sequence[Tree], own: tuple[np.ndarray, int, OutputLayer], other: tuple[Hidden, OutputLayer]
) -> tuple[list[np.ndarray], int]:
    """Values of every branch of merged trees, and where the next trees' hidden states begin."""
    states, start, layer = own
    hidden, other_layer = other
    other_NH = hidden.of(trees).float()
    stop = start + len(other_NH)
    own_NH = torch.from_numpy(np.array(states[start:stop])).to(other_NH.device)
    values = position_divergence(own_NH, layer, other_NH, other_layer).cpu().numpy()
    lengths = [len(branch) for tree in trees for branch in tree.branches]
    return np.split(values, np.cumsum(lengths)[:-1]), stop


def _opened(candidate: Candidate, dtype: str) -> tuple[Hidden, OutputLayer]:
    torch.set_float32_matmul_precision("highest")
    model = load_causal_lm(candidate.merged(), candidate.spec, getattr(torch, dtype)).to(device_kind()).eval()
    layer = output_layer_of(model)
    # in float32 once, not once per chunk
    weight = torch.nn.Parameter(layer.weight_VH.float(), requires_grad=False)
    return hidden_states_of(model, "tree", torch.float32), replace(layer, weight_VH=weight)


def _merged(requests: Sequence[Request], part: Sequence[Sequence[int]]) -> tuple[list[Tree], list[list[int]]]:
    return merge([tree_of(requests, group) for group in part])


def _must_be_comparable(model: Candidate, layer: OutputLayer, baseline: Candidate, other: OutputLayer) -> None:
    rows = [len(one.weight_VH) for one in (layer, other)]
    if rows[0] != rows[1]:
        raise ConfigError(
            f"the output layers of {model.name} and {baseline.name} have {rows[0]} and {rows[1]} tokens, so their distributions "
            "cannot be compared token by token"
        )


def _chunks(positions: int, size: int) -> Iterator[slice]:
    for start in range(0, positions, size):
        yield slice(start, min(start + size, positions))
