"""One experiment's configuration: every field, its meaning and its limits, declared here once.

Strict: unknown keys, values out of range and combinations that make no sense are refused. `pipeline.config.files` reads and
writes it.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from pipeline.config.judges import IMPLICIT, JudgeConfig, pair_judge_problem
from pipeline.config.losses import LossType, loss_problems


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str | dict) else value


LossTypes = Annotated[list[LossType], BeforeValidator(_as_list), Field(min_length=1)]
OneOrMore = Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]
Judges = Annotated[list[JudgeConfig], BeforeValidator(_as_list), Field(min_length=1)]
# what tables say where a model's name could stand
TAKEN = ("policy", "reference", "tie", "failed", "pair")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def _changed(section: BaseModel) -> set[str]:
    """Fields that differ from their defaults."""
    fields = type(section).model_fields
    return {name for name in fields if getattr(section, name) != fields[name].get_default(call_default_factory=True)}


class DataConfig(_Section):
    """Preference data, how it becomes token ids, and the split."""

    path: OneOrMore = Field(description="files (JSONL, JSON, Parquet), folders or Hub data set ids; one or a list")
    eval_path: str | None = Field(None, description="held-out pairs from here instead of from `path`")
    eval_fraction: float = Field(
        0.1, ge=0, lt=1, description="share of prompts held out when there is no `eval_path`; 0 = none"
    )
    split: str = Field("train", description="which split to read of a folder or Hub data set")
    revision: str | None = Field(None, description="revision of a Hub data set")
    columns: dict[Literal["prompt", "chosen", "rejected", "system"], str] = Field(
        default_factory=dict, description="column map for data whose columns have other names"
    )
    template: Literal["chat", "none"] = Field(
        "chat", description="chat: the model's chat template; none: plain text, ended by the end-of-sequence token"
    )
    max_length: int = Field(1024, ge=2, description="prompt plus response, in tokens")
    too_long: Literal["drop", "truncate_response"] = Field("drop", description="what happens to longer pairs")
    max_rows: int | None = Field(None, ge=1, description="read at most this many rows of each source")


class ReferenceConfig(_Section):
    """The frozen model, how it is scored, and where its scores are kept."""

    model: str = Field("embedded:smollm2-135m-instruct", description="local directory, Hub id or embedded:<name>")
    revision: str | None = Field(None, description="Hub revision")
    trust_remote_code: bool = Field(False, description="run code that comes with the model; needs a full revision")
    adapter: str | None = Field(None, description="directory of a PEFT adapter, merged into the model before scoring")
    engine: Literal["vllm", "transformers"] = Field("vllm", description="what computes the scores")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: float32 on CPU; on a GPU bfloat16, with a float32 output layer"
    )
    store: OneOrMore = Field(
        default=["data/store"],
        description="directories or URLs (s3://...) of the scores, shared by experiments: the first is written, all are read",
    )
    workers: int = Field(
        1, ge=1, description="engines side by side, one a GPU (or group of GPUs) or an equal share of the processors"
    )
    launcher: Literal["local", "ray"] = Field(
        "local", description="local: workers are processes of this machine; ray: actors of a Ray cluster (extra `ray`)"
    )
    tensor_parallel_size: int = Field(
        1, ge=1, description="GPUs, or groups of processors, that one engine of vLLM spreads a model over"
    )
    share_prompts: bool = Field(
        True, description="read a prompt once for all responses to it; false: every sequence is read whole"
    )
    tokens_per_shard: int | None = Field(
        None,
        ge=1,
        description="tokens scored between two publications; default 16384 on CPU, 1048576 on a GPU, an eighth at first",
    )
    max_batched_tokens: int | None = Field(
        None, ge=16, description="tokens in one forward pass; default: what a 1 GiB block of logits allows"
    )
    kv_cache_gib: float | None = Field(None, gt=0, description="vLLM's key-value cache on CPU; default: what is needed")


class LoraConfig(_Section):
    """Low-rank adapters instead of all weights (PEFT)."""

    r: int = Field(16, ge=1, description="rank")
    alpha: float = Field(32.0, gt=0, description="scale: the update is multiplied by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapter, while training")
    target_modules: str | list[str] = Field(
        "all-linear", description="names of layers, or all-linear: every linear layer but the output layer"
    )
    merge: bool = Field(True, description="also write model/ with the adapter merged into the base")


class PolicyConfig(_Section):
    """The model that is trained."""

    model: str = Field("embedded:smollm2-135m-instruct", description="local directory, Hub id or embedded:<name>")
    revision: str | None = Field(None, description="Hub revision")
    trust_remote_code: bool = Field(False, description="run code that comes with the model; needs a full revision")
    lora: LoraConfig | None = Field(
        None, description="train low-rank adapters: {r, alpha, dropout, target_modules, merge}"
    )
    load_in_4bit: bool = Field(False, description="QLoRA: the base in 4 bits (NF4, bitsandbytes); needs lora")

    @model_validator(mode="after")
    def _four_bits_need_adapters(self) -> PolicyConfig:
        if self.load_in_4bit and self.lora is None:
            raise ValueError("policy.load_in_4bit needs policy.lora: weights of 4 bits cannot be trained themselves")
        return self


class TrainConfig(_Section):
    """Optimisation; names are TRL's if TRL has one."""

    objective: Literal["preference", "reward"] = Field(
        "preference",
        description="preference: train the policy; reward: train a Bradley-Terry reward model on the pairs",
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
    max_grad_norm: float = Field(1.0, gt=0)
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
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, more time")
    seed: int = Field(0, ge=0, description="order of the pairs, dropout")
    logging_steps: int = Field(1, ge=1)
    eval_steps: int = Field(50, ge=0, description="evaluate every so many steps; 0 = only before and after")
    save_steps: int = Field(50, ge=0, description="checkpoint every so many steps; 0 = only at the end")
    save_total_limit: int = Field(1, ge=1, description="checkpoints kept")

    @field_validator("loss_weights")
    @classmethod
    def _some_weight(cls, weights: list[float] | None) -> list[float] | None:
        if weights is not None and (min(weights) < 0 or not any(weights)):
            raise ValueError("weights must not be negative, nor all be 0")
        return weights

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        problems = loss_problems(self, _changed(self))
        if problems:
            raise ValueError("; ".join(problems))
        return self


class GenerateConfig(_Section):
    """Sampling: held-out prompts for stage three, training prompts for new pairs."""

    max_tokens: int = Field(256, ge=1, description="longest response, in tokens")
    temperature: float = Field(0.7, ge=0)
    top_p: float = Field(1.0, gt=0, le=1, description="below 1: from the likeliest tokens only; slow on CPU")
    samples: int = Field(1, ge=1, description="responses for each prompt and model")
    seed: int = Field(0, ge=0)
    max_prompts: int | None = Field(None, ge=1, description="at most so many held-out prompts")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: what the reference is scored in, float32 on CPU and bfloat16 on a GPU"
    )
    baseline: str | None = Field(
        None, description="model that stands for the reference in stage three; default: the configured reference"
    )
    models: dict[str, str] = Field(
        default_factory=dict,
        description="further models to judge, name: model directory, PEFT adapter, Hub id, embedded:<name> or run:<run>",
    )
    kl_samples: int = Field(
        1, ge=0, description="responses a prompt at temperature 1, by which KL to the reference is measured; 0 = none"
    )
    pair_samples: int = Field(8, ge=2, description="responses for each training prompt from which a new pair is made")
    pair_prompts: int | None = Field(None, ge=1, description="at most so many training prompts for new pairs")
    pair_judge: str | None = Field(
        None, description="judge that makes the pairs, listed under `judge` or not; default: the first listed of texts"
    )
    pair_margin: float = Field(
        0.25, ge=0, description="best and worst response must differ by so much of the judge's reward, else no pair"
    )
    next_reference: Literal["fixed", "previous"] = Field(
        "fixed", description="reference of the next round: fixed: the configured one; previous: the last round's policy"
    )


class Config(_Section):
    """Everything one experiment is made of."""

    data: DataConfig
    reference: ReferenceConfig = ReferenceConfig()
    policy: PolicyConfig = PolicyConfig()
    train: TrainConfig = TrainConfig()
    generate: GenerateConfig = GenerateConfig()
    judge: Judges = Field(
        default=[JudgeConfig(name=name) for name in ("implicit", "rule:complete_and_concise", "rule:no_repetition")],
        description="judges by name, or with settings of their own: pipeline/config/judges.py",
    )

    @model_validator(mode="after")
    def _sensible(self) -> Config:
        problems = [
            f"{name}.trust_remote_code needs {name}.revision as a full 40-digit commit, got {section.revision!r}"
            for name, section in (("reference", self.reference), ("policy", self.policy))
            if section.trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", section.revision or "")
        ]
        if self.reference.tensor_parallel_size > 1 and self.reference.engine != "vllm":
            problems.append("reference.tensor_parallel_size spreads vLLM's model: it needs reference.engine=vllm")
        if self.reference.kv_cache_gib is not None and self.reference.engine != "vllm":
            problems.append("reference.kv_cache_gib is the size of vLLM's cache: it needs reference.engine=vllm")
        shown = [judge.shown for judge in self.judge]
        problems += [
            f"judge {name!r} is listed twice: give one a label" for name in set(shown) if shown.count(name) > 1
        ]
        judge_name = self.generate.pair_judge
        if (
            judge_name is not None
            and (judge_name == IMPLICIT or judge_name not in shown)
            and (problem := pair_judge_problem(judge_name))
        ):
            problems.append(f"generate.pair_judge: {problem}")
        problems += [
            f"generate.models: {name!r} cannot name a model: letters, digits, '.', '_' and '-', none of {', '.join(TAKEN)}"
            for name in self.generate.models
            if name in TAKEN or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self


def without_reference(config: Config) -> Config:
    """The configuration of an experiment that compares with no reference: the policy stands for it, as far as token ids go."""
    policy = config.policy
    stands = {"model": policy.model, "revision": policy.revision, "trust_remote_code": policy.trust_remote_code}
    return config.model_copy(update={"reference": config.reference.model_copy(update={**stands, "adapter": None})})
