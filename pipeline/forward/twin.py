"""A small random twin of a model: the same architecture, with every window and every limit of positions within a few tokens.

What an architecture does beyond its window, or to a short sequence beside a long one, shows in no short probe of the loaded
model; on the twin it shows within fifty tokens. Widths of heads stay as they are, as some architectures tie other fields to
them; layers are two of each kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from pipeline.errors import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOW = 8
# positions of rotary embeddings that a scaling stretches: a probe is longer. Learned positions cannot be exceeded
STRETCHED, LEARNED = 24, 64
VOCABULARY = 128

_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size",
           "shared_intermediate_size", "mlp_hidden_size")  # fmt: skip
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
_WINDOWS = ("sliding_window", "attention_window", "attention_window_size", "attention_chunk_size", "window_size")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim")


class NoTwin(Exception):
    """The architecture cannot be built small; the message says why."""


def twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """A twin of `model` on CPU, float32, with transformers' eager attention, in evaluation mode.

    Leaves the caller's random state as it was. Raises NoTwin.
    """
    settings = model.config.to_dict()
    for nested in (settings, settings.get("text_config")):
        if isinstance(nested, dict) and any(name in nested for name in _LAYERS):
            _shrink(nested)
    if "text_config" in settings and type(model.config).__name__ != type(model.config.get_text_config()).__name__:
        raise NoTwin("it is more than a language model")
    for name in ("quantization_config", "dtype", "torch_dtype", "_name_or_path"):
        settings.pop(name, None)
    try:
        with _own_random_state(), torch.device("cpu"):
            twin: PreTrainedModel = type(model)(type(model.config).from_dict(settings)).eval()
            twin.set_attn_implementation("eager")
            _fill(twin)
    except Exception as error:  # noqa: BLE001  # an architecture may refuse sizes that it never saw in any way it likes
        raise NoTwin(f"no small twin of it can be built ({type(error).__name__}: {first_line(error)})") from None
    return twin


def stretched_from(model: PreTrainedModel) -> int | None:
    """Longest sequence in tokens whose rotary embeddings do not depend on how long a sequence beside it is.

    None if they never do. transformers' `dynamic` takes another base, `longrope` other factors, from the longest position of a
    forward pass on.
    """
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in parameters.values() if isinstance(kind, dict)] or [parameters]
    limits = []
    for kind in kinds:
        if kind.get("rope_type") == "dynamic":
            limits.append(config.max_position_embeddings)
        elif kind.get("rope_type") == "longrope":
            original = kind.get("original_max_position_embeddings")
            limits.append(
                original or getattr(config, "original_max_position_embeddings", config.max_position_embeddings)
            )
    return min(limits, default=None)


def _shrink(settings: dict[str, Any]) -> None:
    """Make the settings of a language model small, in place."""
    _shrink_heads(settings)
    layers = _first(settings, _LAYERS)
    chosen = _layers_of_each_kind(settings, layers)
    for name, value in list(settings.items()):
        if isinstance(value, list) and len(value) == layers and name != "rope_parameters":
            settings[name] = [value[number] for number in chosen]
    _replace(settings, _LAYERS, len(chosen))
    # dense layers before those with experts
    for name in ("first_k_dense_replace", "num_dense_layers"):
        if settings.get(name):
            settings[name] = 1
    _replace(settings, _WIDTHS, 48)
    _replace(settings, _EXPERTS, 4)
    for name in _CHOSEN:
        if isinstance(settings.get(name), int):
            settings[name] = min(settings[name], 2)
    for name in ("n_group", "topk_group"):
        if settings.get(name):
            settings[name] = 1
    for name in _WINDOWS:
        if settings.get(name):
            settings[name] = WINDOW
    _shrink_positions(settings)
    settings["vocab_size"] = VOCABULARY
    for name, value in settings.items():
        if name.endswith("token_id") and isinstance(value, int | list):
            settings[name] = None if name != "pad_token_id" else 0


def _shrink_heads(settings: dict[str, Any]) -> None:
    heads, hidden = _first(settings, _HEADS), _first(settings, _HIDDEN)
    if not heads or not hidden:
        return
    size = settings.get("head_dim") or hidden // heads
    keys = _first(settings, _KEY_HEADS) or heads
    few_keys = min(keys, 2)
    few = few_keys * min(max(heads // keys, 1), 2)
    for name in _HIDDEN:
        if isinstance(settings.get(name), int):
            settings[name] = size * few if settings[name] == hidden else min(settings[name], size * few)
    # Zamba's attention is wider than its layers
    if isinstance(wide := settings.get("attention_hidden_size"), int):
        settings["attention_hidden_size"] = size * few * wide // hidden
        settings["attention_head_dim"] = settings["attention_hidden_size"] // few
    _replace(settings, _HEADS, few)
    _replace(settings, _KEY_HEADS, few_keys)


def _shrink_positions(settings: dict[str, Any]) -> None:
    scaling = settings.get("rope_scaling")
    parameters = settings.get("rope_parameters") or {}
    kinds = [kind for kind in parameters.values() if isinstance(kind, dict)] or [parameters]
    stretched = bool(scaling) or any(kind.get("rope_type", "default") != "default" for kind in kinds)
    _replace(settings, _POSITIONS, STRETCHED if stretched else LEARNED)
    for part in (settings, *kinds, scaling if isinstance(scaling, dict) else {}):
        if isinstance(part.get("original_max_position_embeddings"), int):
            part["original_max_position_embeddings"] = STRETCHED // 2


def _layers_of_each_kind(settings: dict[str, Any], layers: int) -> list[int]:
    """Two layers of each kind, by every list that says something of each layer; at most eight."""
    lists = [value for value in settings.values() if isinstance(value, list) and len(value) == layers]
    seen: dict[str, int] = {}
    chosen = []
    for number in range(layers):
        kind = repr([of_layers[number] for of_layers in lists])
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] <= 2:
            chosen.append(number)
    # without such lists an architecture may count its kinds out: every fourth layer, all but the first
    return (chosen if lists else list(range(min(layers, 4))))[:8]


def _fill(twin: PreTrainedModel) -> None:
    """Random matrices, so large that what a position attends to shows in its hidden state."""
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=1.3 / parameter.shape[-1] ** 0.5)


@contextmanager
def _own_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _first(settings: dict[str, Any], names: tuple[str, ...]) -> int:
    return next((settings[name] for name in names if isinstance(settings.get(name), int)), 0)


def _replace(settings: dict[str, Any], names: tuple[str, ...], value: int) -> None:
    for name in names:
        if isinstance(settings.get(name), int) and not isinstance(settings[name], bool):
            settings[name] = value
