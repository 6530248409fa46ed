"""The trainer's model, optimizer and pass on tensors that have shapes and no numbers, as torch's FakeTensorMode makes them.

Others stand for what needs numbers: a fused attention that keeps as much, an optimizer with the states of bitsandbytes'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.config.experiment import Config
from pipeline.forward.output_layer import OutputLayer
from pipeline.forward.routes import layers_of
from pipeline.training.lean import OFFLOADED_BYTES
from pipeline.training.optimizers import make_optimizer
from pipeline.training.policies import adapted_model, precision_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION = "refscore_simulated"


def model_of(config: Config, base: Path, kind: str) -> tuple[PreTrainedModel, OutputLayer]:
    """The policy and its output layer; to be called in FakeTensorMode."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

    precision, policy, train = precision_of(config), config.policy, config.train
    described = AutoConfig.from_pretrained(base, trust_remote_code=policy.trust_remote_code, local_files_only=True)
    frozen = policy.lora is not None and precision == torch.bfloat16
    dtype = described.dtype if frozen and described.dtype is not None else getattr(torch, policy.dtype)
    with unset_fake_temporarily(), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            described, dtype=dtype, trust_remote_code=policy.trust_remote_code
        )
        if policy.lora is not None:
            adapted_model(model, policy.lora, "CAUSAL_LM")
    _without_numbers(model)
    AttentionInterface.register(_ATTENTION, _attend)
    model.set_attn_implementation(_ATTENTION)
    if train.gradient_checkpointing is True or (train.gradient_checkpointing == "auto" and kind == "cuda"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if policy.lora is not None:
            model.enable_input_require_grads()
    model.train()
    head = model.get_output_embeddings()
    return model, OutputLayer(head.weight, head.bias, 1.0, None, computes_as=kind)


def _without_numbers(model: torch.nn.Module) -> None:
    """Replace a model's meta tensors by fake ones that count as memory; tied weights stay tied."""
    replaced: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in replaced:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                replaced[id(parameter)] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
            setattr(module, name, replaced[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def loss_of(
    config: Config, model: PreTrainedModel, layer: OutputLayer, tokens: int, scored: int, kind: str
) -> torch.Tensor:
    """A forward pass over `tokens` tokens, of which `scored` predict response tokens, on a device of `kind`."""
    precision = precision_of(config)
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    narrow = torch.autocast("cpu", torch.bfloat16) if precision == torch.bfloat16 else nullcontext()
    offloaded = _forgotten(model) if config.train.activation_offloading and kind == "cuda" else nullcontext()
    with offloaded:
        with narrow:
            output = layers_of(model)(
                input_ids=ids, attention_mask=torch.zeros(1, 1, 1, 1), position_ids=ids, use_cache=False
            )
        hidden_NH = output.last_hidden_state[0, :scored]
        del output
        logps, _ = layer.logps(hidden_NH, torch.zeros(scored, dtype=torch.int64), precision)
        return logps.sum()


def _attend(
    module: torch.nn.Module,  # noqa: ARG001  # transformers' signature
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001
    *,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """A fused attention that keeps what FlexAttention keeps: its operands, its result and a row sum per head."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (side.bfloat16() for side in (query, key, value))
    elif query.dtype == torch.float32:  # as `pipeline.forward.attention` on a CPU: every head has its own keys
        groups = query.shape[1] // key.shape[1]
        key, value = (side.repeat_interleave(groups, dim=1) for side in (key, value))
    shared = query.shape[1] != key.shape[1]
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=shared
    )
    return attended.transpose(1, 2).contiguous(), None


@contextmanager
def _forgotten(model: torch.nn.Module) -> Iterator[None]:
    """As `offloaded_activations`, for one memory: what would wait in the other one takes none here."""
    # numbers of storages: the objects that stand for them in Python are made anew at every call
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}  # noqa: SLF001  # has no public name

    def pack(tensor: torch.Tensor) -> Any:
        small = tensor.numel() * tensor.element_size() < OFFLOADED_BYTES
        if small or tensor.untyped_storage()._cdata in weights:  # noqa: SLF001
            return tensor
        return tensor.shape, tensor.dtype

    def unpack(packed: Any) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else torch.empty(packed[0], dtype=packed[1])

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class _Bytes(torch.optim.Optimizer):
    """Stands for bitsandbytes' optimizer, whose kernels need numbers: the same states, a byte per moment and a scale per 256."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # noqa: ARG002  # torch's
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or self.state[parameter]:
                    continue
                few = parameter.numel() < 4096
                moment = torch.float32 if few else torch.uint8
                for name in ("state1", "state2"):
                    self.state[parameter][name] = torch.zeros(parameter.shape, dtype=moment)
                    if not few:
                        self.state[parameter][f"absmax_{name}"] = torch.zeros(-(-parameter.numel() // 256))


def optimizer_of(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    """The configured optimizer over the weights of `model` that learn, as yet without states."""
    if config.train.optimizer != "adamw_8bit":
        return make_optimizer(model, config.train)
    return _Bytes([{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}])
