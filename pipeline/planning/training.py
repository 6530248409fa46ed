"""How much memory a training step holds at its peak, found by running it on tensors that have shapes and no numbers.

The step is the trainer's own: model, checkpointing, output layer, optimizer, the step inside the backward pass. torch's
FakeTensorMode runs it without memory and its MemTracker adds up what is alive. What is left out: the fragmentation of an
allocator, CUDA's own context and kernels (about half a GiB), and what a step does not hold (evaluation, the export's check).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.config.experiment import Config
from pipeline.errors import ConfigError, first_line
from pipeline.forward.output_layer import OutputLayer
from pipeline.forward.routes import layers_of
from pipeline.training.lean import OFFLOADED_BYTES, StepInBackward
from pipeline.training.optimizers import clip, make_optimizer, step_all
from pipeline.training.policies import adapted_model, precision_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION = "refscore_simulated"


@dataclass(frozen=True)
class Held:
    """Bytes at the peak of a step on one device, by what they are."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.temporary


@contextmanager
def held_by(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[list[Held]]:
    """Track the memory of tensors while it is entered; afterwards the list has one entry, the peak."""
    tracker, peak = _tracker(), list[Held]()
    tracker.track_external(*(part for part in (model, optimizer) if part is not None))
    with tracker, warnings.catch_warnings():
        # the step inside the backward pass has dropped the gradient before the tracker looks at it
        warnings.filterwarnings("ignore", message="Expected a tensor or a traceable wrapper-subclass")
        yield peak
    snapshots = tracker.get_tracker_snapshot("peak").values()
    found = {str(getattr(name, "value", name)): size for snapshot in snapshots for name, size in snapshot.items()}
    peak.append(
        Held(
            weights=found["Parameter"] + found["Buffer"],
            gradients=found["Gradient"],
            optimizer=found["Optstate"],
            activations=found["Activation"],
            temporary=found["Temp"] + found["Other"],
        )
    )


def simulate_step(config: Config, base: Path, tokens: int, scored: int, kind: str) -> Held:
    """What a step holds whose forward pass reads `tokens` tokens, of which `scored` predict response tokens.

    `kind`: the device that the step computes as, "cpu" or "cuda". Raises ConfigError for what is not simulated: bases of 4 bits
    and reward models.
    """
    if config.policy.load_in_4bit or config.train.objective != "preference":
        raise ConfigError("memory is predicted for the preference objective and bases of 16 or 32 bits alone")
    from torch._subclasses.fake_tensor import FakeTensorMode

    # it logs tracebacks of what is said in one line below
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    try:
        with FakeTensorMode():
            model, layer, optimizer = without_numbers_of(config, base, kind)
            inside = StepInBackward(optimizer) if config.train.optimizer_in_backward else None
            with held_by(model, optimizer) as peak:
                step_of(config, model, layer, tokens, scored, kind)
                if inside is None:
                    clip(model, config.train.max_grad_norm)
                    step_all(optimizer)
                    optimizer.zero_grad()
                else:
                    inside.grad_norm()
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, AssertionError) as error:
        # layers that look at numbers (experts), or have no attention that can be replaced
        raise ConfigError(
            f"memory is not predicted for {config.policy.model!r}: its layers do not run without numbers ({first_line(error)})"
        ) from None
    return peak[0]


def without_numbers_of(
    config: Config, base: Path, kind: str
) -> tuple[PreTrainedModel, OutputLayer, torch.optim.Optimizer]:
    """The policy, its output layer, and its optimizer with the states that it has after a step; to be called in FakeTensorMode."""
    model, layer = _model(config, base, kind)
    optimizer = _optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    step_all(optimizer)
    optimizer.zero_grad()
    return model, layer, optimizer


def _tracker() -> Any:
    from torch.distributed._tools import mem_tracker

    tracker_class: Any = mem_tracker.MemTracker

    class Nothing:
        def remove(self) -> None: ...

    class Peak(tracker_class):  # type: ignore[misc]  # torch leaves it untyped
        """Without the peak of every module, which takes most of its time, and for weights that do not learn too."""

        def _track_module_params_and_buffers(
            self,
            module: torch.nn.Module,
            install_grad_hooks: bool = True,  # noqa: FBT001, FBT002  # torch's signature
        ) -> tuple[int, int]:
            for parameter in module.parameters():
                if not parameter.requires_grad:
                    # it would be asked for a hook on a gradient that it never has
                    self._param_to_grad_hook_handles[parameter] = (Nothing(), Nothing())
            tracked: tuple[int, int] = super()._track_module_params_and_buffers(module, install_grad_hooks)
            return tracked

        def _update_peak_stats(self, peak_state: Any) -> None:  # noqa: ARG002  # torch's signature
            for device, snapshot in self._curr_mem_snap.items():
                if self._peak_mem.get(device, 0) < snapshot["Total"]:
                    self._peak_mem[device], self._peak_mem_snap[device] = snapshot["Total"], dict(snapshot)

    return Peak()


def _model(config: Config, base: Path, kind: str) -> tuple[PreTrainedModel, OutputLayer]:
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


def step_of(
    config: Config,
    model: PreTrainedModel,
    layer: OutputLayer,
    tokens: int,
    scored: int,
    kind: str,
    *,
    backward: bool = True,
) -> None:
    """A forward pass and, with `backward`, its backward pass."""
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
        loss = logps.sum()
    del hidden_NH, logps
    if backward:
        torch.autograd.backward(loss)


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


def _optimizer(model: PreTrainedModel, config: Config) -> torch.optim.Optimizer:
    if config.train.optimizer != "adamw_8bit":
        return make_optimizer(model, config.train)
    return _Bytes([{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}])
