"""The model that is trained: all its weights, adapters on a frozen base (LoRA, QLoRA), or a reward model's layers and head.

Owns loading and what of it learns; how it is saved is `pipeline.training.save`'s.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from pipeline.config.experiment import Config
from pipeline.config.training import LoraConfig
from pipeline.errors import ConfigError, first_line
from pipeline.forward.compiled import compile_layers
from pipeline.forward.cpu_products import recomputation
from pipeline.hardware import device_kind, multiplies_bfloat16
from pipeline.training.objectives.objective import objective_of
from pipeline.training.parallel.unread import NOWHERE, Unread

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


log = logging.getLogger(__name__)

# parts of the names under which architectures keep how much is left to chance
_RANDOM = ("dropout", "pdrop", "layerdrop", "jitter")


@dataclass(frozen=True)
class Policy:
    """`model` is what runs; `adapted` is PEFT's view of it if adapters are trained; `forward` is its pass over
    trees, a `Forward` or `Rewards`, or that of a model in shards. `unread`: its weights, if nobody has read them yet.
    """

    model: PreTrainedModel
    adapted: Any
    forward: Any
    unread: Unread | None = None


def precision_of(config: Config) -> torch.dtype:
    """What `train.precision` means on this machine: torch.float32, or torch.bfloat16 under autocast, in which weights of 16 bits
    are always trained.
    """
    precision = config.train.precision
    if precision == "auto" and config.policy.dtype == "float32":
        return torch.bfloat16 if multiplies_bfloat16() else torch.float32
    return torch.float32 if precision == "float32" else torch.bfloat16


def load_policy(
    base: Path,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    ends: set[int],
    to: Literal["device", "host", "parts"] = "device",
) -> Policy:
    """The configured policy from the directory `base`, without dropout but that of adapters; `ends` end responses.

    `to`: host leaves it in the machine's memory, to be brought to devices in parts, where its pass then runs; parts reads no
    weight yet. Raises ConfigError if the architecture, or this machine, cannot do what is asked; NotInParts if it is read whole
    or not at all.
    """
    policy, train = config.policy, config.train
    precision = precision_of(config)
    # TF32 has a third of float32's digits; whatever a library set, float32 is float32 here
    torch.set_float32_matmul_precision("highest")
    if precision == torch.bfloat16 and not multiplies_bfloat16():
        log.warning(
            "this processor has no instructions for bfloat16: train.precision=float32 is many times as fast here"
        )
    options: dict[str, Any] = {}
    if policy.load_in_4bit:
        options["quantization_config"] = four_bits(precision)
    if train.activation_offloading and device_kind() == "cpu":
        log.warning("train.activation_offloading saves nothing here: without a GPU there is no second memory")
    if to == "parts":
        options |= NOWHERE
    objective = objective_of(train)
    model = objective.load(base, config, tokenizer, ends, precision, **options)
    unread = Unread(model, base) if to == "parts" else None
    if policy.load_in_4bit:
        without_packing(model)
    model = model.to(device_kind()) if to == "device" else model
    without_dropout(model)
    adapted = adapted_model(model, policy.lora, objective.adapter_task) if policy.lora else None
    if on_a_gpu(train.gradient_checkpointing):
        contexts = {"context_fn": recomputation} if device_kind() == "cpu" else {}
        model.gradient_checkpointing_enable({"use_reentrant": False, **contexts})
        if adapted is not None:
            model.enable_input_require_grads()
    forward = objective.forward_of(model, train.layout, precision, torch.device(device_kind()), whole=unread is None)
    if on_a_gpu(train.torch_compile) and compile_layers(model) == 0:
        log.warning("train.torch_compile: the layers of %s are not found, so none is compiled", type(model).__name__)
    return Policy(model, adapted, forward, unread)


def on_a_gpu(setting: bool | str) -> bool:  # noqa: FBT001  # a field's value
    """What a field says that may be "auto": on a GPU alone."""
    return device_kind() == "cuda" if setting == "auto" else bool(setting)


def without_dropout(model: PreTrainedModel) -> None:
    """Turn off for good whatever is random in a forward pass of training: the stored reference was scored without it.

    Architectures drop out by modules, by numbers that they hand to functions, and by skipping layers; experts are chosen with
    noise. All of these numbers are attributes of modules. The configuration keeps its own, for whoever trains on.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):  # noqa: SLF001  # what all kinds of dropout derive from
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and any(word in name for word in _RANDOM):
                setattr(module, name, 0.0)


def four_bits(precision: torch.dtype) -> Any:
    """The configuration of a base in NF4. Raises ConfigError if bitsandbytes is missing."""
    if find_spec("bitsandbytes") is None:
        raise ConfigError("policy.load_in_4bit needs the package bitsandbytes: .venv/bin/uv pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=precision,
        llm_int8_skip_modules=["lm_head", "score"],
    )


def without_packing(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing weights for inference on CPU, at the first pass without gradients and for good.

    On processors with AVX512-BF16 it does so in every evaluation, and what it computes with packed weights has no gradient:
    adapters below learned next to nothing of what they should.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def adapted_model(model: PreTrainedModel, lora: LoraConfig, task: str) -> Any:
    """PEFT's view of `model` with adapters, which alone learn; `task` is PEFT's name. ConfigError if they do not fit the model."""
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    settings = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type=task,
    )
    tied = _is_tied(model)
    try:
        adapted = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(
            f"policy.lora.target_modules {lora.target_modules!r} does not fit {type(model).__name__} ({first_line(error)})"
        ) from None
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise ConfigError("policy.lora.target_modules: the output layer cannot have an adapter; leave it out")
    if tied and isinstance(model.get_input_embeddings(), BaseTunerLayer):
        raise ConfigError(
            "policy.lora.target_modules: the embeddings cannot have an adapter, as this model's output layer is tied to them: "
            "merged, the adapter would change the output layer too, which it did not in training. Leave them out"
        )
    return adapted


def _is_tied(model: PreTrainedModel) -> bool:
    """Whether the output layer's weights are the embeddings'."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and embeddings is not None and head.weight is embeddings.weight
