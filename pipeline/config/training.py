"""What stage two is asked for: the policy and its training, field by field. Names are TRL's if TRL has one."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from pipeline.config.losses import LossType, loss_problems
from pipeline.config.rollouts import PolicyGradientConfig
from pipeline.config.sections import Section, as_list, changed

LossTypes = Annotated[list[LossType], BeforeValidator(as_list), Field(min_length=1)]


class LoraConfig(Section):
    """Low-rank adapters instead of all weights (PEFT)."""

    r: int = Field(16, ge=1, description="rank")
    alpha: float = Field(32.0, gt=0, description="scale: the update is multiplied by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapter, while training")
    target_modules: str | list[str] = Field(
        "all-linear", description="names of layers, or all-linear: every linear layer but the output layer"
    )
    merge: bool = Field(True, description="also write model/ with the adapter merged into the base")


class PolicyConfig(Section):
    """The model that is trained."""

    model: str = Field("embedded:smollm2-135m-instruct", description="local directory, Hub id or embedded:<name>")
    revision: str | None = Field(None, description="Hub revision")
    trust_remote_code: bool = Field(False, description="run code that comes with the model; needs a full revision")
    lora: LoraConfig | None = Field(
        None, description="train low-rank adapters: {r, alpha, dropout, target_modules, merge}"
    )
    load_in_4bit: bool = Field(False, description="QLoRA: the base in 4 bits (NF4, bitsandbytes); needs lora")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of the weights that learn; bfloat16: a third of the memory, updates are rounded up or down by chance",
    )
    save_dtype: Literal["auto", "float32", "base"] = Field(
        "auto",
        description="of model/: float32, or what the base was saved in; auto: on a GPU base, on a CPU as `dtype`",
    )
    max_shard_size: str = Field("5GB", pattern=r"^[1-9][0-9]*[KMGT]B$", description="of each file of weights in model/")

    @model_validator(mode="after")
    def _fits_together(self) -> PolicyConfig:
        if self.load_in_4bit and self.lora is None:
            raise ValueError("policy.load_in_4bit needs policy.lora: weights of 4 bits cannot be trained themselves")
        if self.dtype == "bfloat16" and self.lora is not None:
            raise ValueError(
                "policy.dtype is that of weights that learn: with policy.lora these are the adapters, float32"
            )
        return self


class TrainConfig(Section):
    """Optimisation; names are TRL's if TRL has one."""

    objective: Literal["preference", "reward", "policy_gradient", "value"] = Field(
        "preference",
        description="preference: train the policy on pairs; reward: train a Bradley-Terry reward model on them; "
        "policy_gradient: train the policy on the samples and rewards of `refscore rollout`; value: train a critic on them, which "
        "begins as policy.model",
    )
    policy_gradient: PolicyGradientConfig = Field(
        PolicyGradientConfig(), description="the loss of objective policy_gradient: {variant, advantage, epsilon, ...}"
    )
    beta: float = Field(0.1, gt=0, description="temperature of the implicit reward")
    loss_type: LossTypes = Field(
        ["sigmoid"],
        description=f"one or a list of {', '.join(get_args(LossType))}; formulas in pipeline/training/objectives/losses.py",
    )
    loss_weights: list[float] | None = Field(None, description="weights of the losses of the list; default: 1 each")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of labels taken to be flipped (cDPO, robust, EXO and others)"
    )
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = Field(
        "reverse_kl", description="what keeps the policy near the reference (f-DPO)"
    )
    f_alpha_divergence_coef: float = Field(0.5, description="alpha of alpha_divergence")
    ld_alpha: float | None = Field(
        None, ge=0, le=1, description="LD-DPO: weight of the tokens beyond the shorter response of a pair; null = 1"
    )
    use_weighting: bool = Field(False, description="WPO: weigh pairs by how much they look like the policy's own")
    discopop_tau: float = Field(0.05, gt=0, description="temperature of DiscoPOP's mixture")
    simpo_gamma: float = Field(0.5, ge=0, description="SimPO's target margin")
    cpo_alpha: float = Field(1.0, ge=0, description="weight of CPO's cross-entropy")
    rpo_eta: float = Field(1.0, gt=0, description="rpo_*: what a unit of a pair's margin is worth, in reward")
    desirable_weight: float = Field(1.0, gt=0, description="kto, bco: weight of the responses that were called good")
    undesirable_weight: float = Field(1.0, gt=0, description="kto, bco: weight of those that were called bad")
    margin_scale: float = Field(
        0.0,
        ge=0,
        description="objective reward: chosen must lead by so many times the pair's margin; 0: margins are not read",
    )
    layout: Literal["tree", "separate"] = Field(
        "tree", description="tree: the prompt is read once for both responses; separate: two sequences"
    )
    precision: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="autocast over float32 weights; auto: bfloat16 if the GPU or processor has instructions for it, else float32",
    )
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = Field(
        "adamw", description="adamw_8bit (bitsandbytes) and adafactor keep a quarter of AdamW's state and less"
    )
    learning_rate: float = Field(1e-6, gt=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field("linear", description="after the warm-up")
    warmup_ratio: float = Field(0.1, ge=0, le=1, description="share of the steps that warm up linearly")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float | None = Field(1.0, gt=0, description="gradients are clipped to this norm; null: never")
    per_device_train_batch_size: int = Field(
        4,
        ge=1,
        description="times gradient_accumulation_steps: pairs of one optimizer step; tokens_per_batch cuts it up",
    )
    per_device_eval_batch_size: int | None = Field(
        None, ge=1, description="pairs in one forward pass of evaluation, at most; default: as tokens_per_batch allows"
    )
    tokens_per_batch: int | None = Field(
        None,
        ge=1,
        description="tokens in one forward pass, as many as fit (a longer pair runs alone): bounds the memory of activations; "
        "default 1024 on CPU, 8192 on a GPU",
    )
    gradient_accumulation_steps: int = Field(
        2, ge=1, description="times per_device_train_batch_size: pairs of one optimizer step"
    )
    num_train_epochs: float = Field(1.0, gt=0, description="passes over the pairs")
    max_steps: int = Field(-1, ge=-1, description="optimizer steps; -1: as the epochs give")
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto", description="recompute activations: less memory, more time; auto: on a GPU"
    )
    activation_offloading: bool = Field(
        False, description="what is kept for the backward pass waits in the machine's memory instead of the GPU's"
    )
    optimizer_in_backward: bool = Field(
        False,
        description="update each weight within the backward pass and keep no gradients: a step is one forward pass; "
        "needs max_grad_norm=null",
    )
    torch_compile: bool | Literal["auto"] = Field("auto", description="compile the layers; auto: on a GPU")
    seed: int = Field(0, ge=0, description="order of the pairs, dropout")
    logging_steps: int = Field(1, ge=1)
    report_to: list[Literal["tensorboard", "trackio", "wandb"]] = Field(
        ["tensorboard"],
        description="what shows the metrics, beside metrics.parquet; trackio and wandb are installed apart",
    )
    eval_steps: int = Field(50, ge=0, description="evaluate every so many steps; 0 = only before and after")
    save_steps: int | None = Field(
        None,
        ge=0,
        description="checkpoint every so many steps; 0 = only at the end; default: every 50, or more rarely if writing would "
        "take more than a twentieth of the time",
    )
    save_total_limit: int = Field(1, ge=1, description="checkpoints kept")
    async_save: bool | Literal["auto"] = Field(
        "auto",
        description="write checkpoints while the next steps are taken, from a copy in the machine's memory; auto: on a GPU, if "
        "the copy fits twice",
    )

    @property
    def on_samples(self) -> bool:
        """Whether it learns from the samples and rewards of `refscore rollout`, not from pairs."""
        return self.objective in ("policy_gradient", "value")

    @property
    def of_scores(self) -> bool:
        """Whether what is trained gives scores instead of texts: a sequence classifier with one label."""
        return self.objective in ("reward", "value")

    @field_validator("report_to")
    @classmethod
    def _once_each(cls, trackers: list[str]) -> list[str]:
        if len(set(trackers)) < len(trackers):
            raise ValueError("the same tracker is named twice")
        return trackers

    @field_validator("loss_weights")
    @classmethod
    def _some_weight(cls, weights: list[float] | None) -> list[float] | None:
        if weights is not None and (min(weights) < 0 or not any(weights)):
            raise ValueError("weights must not be negative, nor all be 0")
        return weights

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        problems = loss_problems(self, changed(self))
        if self.optimizer_in_backward and self.max_grad_norm is not None:
            problems.append("optimizer_in_backward cannot clip what it does not keep: set train.max_grad_norm=null")
        if problems:
            raise ValueError("; ".join(problems))
        return self
