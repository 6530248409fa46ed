"""One experiment's configuration: every field, its meaning and its limits, declared here once.

Strict: unknown keys, values out of range and combinations that make no sense are refused. `pipeline.config.files` reads and
writes it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config.judges import IMPLICIT, JudgeConfig, pair_judge_problem
from pipeline.config.rollouts import RolloutConfig
from pipeline.config.sections import Section, as_list
from pipeline.config.training import PolicyConfig, TrainConfig

OneOrMore = Annotated[list[str], BeforeValidator(as_list), Field(min_length=1)]
Judges = Annotated[list[JudgeConfig], BeforeValidator(as_list), Field(min_length=1)]
# arguments of vLLM's engine that have a field of their own, or that refscore sets itself
OWN_ENGINE_ARGS = {
    "model": "reference.model or what is sampled",
    "dtype": "the field dtype",
    "revision": "the field revision",
    "trust_remote_code": "the field trust_remote_code",
    "tensor_parallel_size": "reference.tensor_parallel_size",
    "max_num_batched_tokens": "reference.max_batched_tokens",
    "kv_cache_memory_bytes": "reference.kv_cache_gib",
    "enable_prefix_caching": "reference.share_prompts",
    "max_model_len": "the longest sequence",
    "hf_overrides": "the numerics, float32 logits",
    "skip_tokenizer_init": "refscore, which sends token ids",
    "seed": "the field seed",
}
# of who computed imported scores, in characters
_LONGEST_NAME = 100
# what tables say where a model's name could stand
TAKEN = ("policy", "reference", "tie", "failed", "pair")


def _dash(value: object) -> object:
    """A lone "-", which YAML takes for a list that holds nothing, as the text that names standard input."""
    return "-" if value == [None] else value


class DataConfig(Section):
    """Preference data, how it becomes token ids, and the split."""

    path: Annotated[OneOrMore, BeforeValidator(_dash)] = Field(
        description="files (JSONL, JSON, CSV, TSV, Parquet; .gz, .zst), patterns like data/*.jsonl, folders, all three here or at "
        "a URL (s3://...), Hub data set ids, or - for standard input; one or a list"
    )
    eval_path: Annotated[str | None, BeforeValidator(_dash)] = Field(
        None, description="held-out pairs from here instead of from `path`"
    )
    eval_fraction: float = Field(
        0.1, ge=0, lt=1, description="share of prompts held out when there is no `eval_path`; 0 = none"
    )
    split: str = Field("train", description="which split to read of a folder or Hub data set")
    revision: str | None = Field(None, description="revision of a Hub data set")
    columns: dict[
        Literal["prompt", "chosen", "rejected", "system", "response", "label", "responses", "scores"], str
    ] = Field(default_factory=dict, description="column map for data whose columns have other names")
    lists: Literal["best_worst", "all_pairs"] = Field(
        "best_worst",
        description="pairs of a ranked list: the best with the worst response, or each with every one that is worse",
    )
    template: Literal["chat", "none"] = Field(
        "chat", description="chat: the model's chat template; none: plain text, ended by the end-of-sequence token"
    )
    special_tokens: Literal["text", "parse"] = Field(
        "text",
        description="control tokens that stand in texts: text: encoded as the text they are; parse: as tokens that act",
    )
    max_length: int | None = Field(
        None,
        ge=2,
        description="prompt plus response, in tokens; default: as many as the reference has positions for, so that no pair that "
        "it can read is left out",
    )
    too_long: Literal["drop", "truncate_response"] = Field("drop", description="what happens to longer pairs")
    max_rows: int | None = Field(None, ge=1, description="read at most this many rows of each source")
    workers: int | None = Field(
        None,
        ge=1,
        description="processes that tokenise, each on a processor of its own; default: one for every 16 MiB of data, at most as "
        "many as there are processors",
    )

    def deciding(self) -> dict[str, Any]:
        """The fields that decide what the rows become."""
        return self.model_dump(mode="json", exclude={"workers"})


class ReferenceConfig(Section):
    """The frozen model, how it is scored, and where its scores are kept."""

    model: str = Field("embedded:smollm2-135m-instruct", description="local directory, Hub id or embedded:<name>")
    revision: str | None = Field(None, description="Hub revision")
    trust_remote_code: bool = Field(False, description="run code that comes with the model; needs a full revision")
    adapter: str | None = Field(None, description="directory of a PEFT adapter, merged into the model before scoring")
    engine: Literal["vllm", "transformers", "imported"] = Field(
        "vllm", description="what computes the scores; imported: nothing here, they are those that `imported_by` names"
    )
    imported_by: str | None = Field(
        None,
        description="name under which `refscore import` took scores that others computed; with engine imported only",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="on which the scores are computed; auto: a GPU if this machine has one. Set it to plan, join or drive for "
        "GPUs from a machine without",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="auto: float32 on CPU; on a GPU bfloat16, with a float32 output layer; of imported scores: not known",
    )
    logps: Literal["exact", "fixed_point"] = Field(
        "exact",
        description="how the store keeps values per token; exact: as float32; fixed_point: rounded to 2^-12 nats, half the bytes, "
        "with exact sums: for dtype bfloat16 and float16, which round more",
    )
    store: OneOrMore = Field(
        default=["data/store"],
        description="directories or URLs (s3://...) of the scores, shared by experiments: the first is written, all are read",
    )
    workers: int = Field(
        1,
        ge=1,
        description="engines side by side, one a GPU (or group of GPUs) or an equal share of the processors; more than one are "
        "actors of Ray (extra `ray`)",
    )
    launcher: Literal["local", "ray"] = Field(
        "local", description="where workers run; local: on this machine; ray: on the Ray cluster that RAY_ADDRESS names"
    )
    hangs_after: float | None = Field(
        None,
        gt=0,
        description="minutes for one shard after which one of several engines counts as hung: its process ends, and what it had is "
        "scored again; default: 30 on a GPU, 240 on a CPU",
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
    kv_cache_gib: float | None = Field(
        None, gt=0, description="vLLM's key-value cache of each device; default: what is needed"
    )
    engine_args: dict[str, Any] = Field(
        default_factory=dict,
        description="further arguments of vLLM's engine; those that may change numbers are part of the reference's identity",
    )
    price_per_hour: float = Field(
        0,
        ge=0,
        allow_inf_nan=False,
        description="price of one device per hour, any currency: progress and `refscore plan` say what scoring costs",
    )

    @property
    def in_actors(self) -> bool:
        """Whether what is missing is scored by actors of Ray, and not in this process."""
        return self.workers > 1 or self.launcher == "ray"


class GenerateConfig(Section):
    """Sampling: held-out prompts for stage three, training prompts for new pairs."""

    max_tokens: int = Field(256, ge=1, description="longest response, in tokens")
    fixed_length: bool = Field(
        False,
        description="no token that ends a response is sampled: all have max_tokens tokens, and length explains nothing",
    )
    temperature: float = Field(0.7, ge=0)
    top_p: float = Field(1.0, gt=0, le=1, description="below 1: from the likeliest tokens only; slow on CPU")
    samples: int = Field(1, ge=1, description="responses for each prompt and model")
    seed: int = Field(0, ge=0)
    max_prompts: int | None = Field(None, ge=1, description="at most so many held-out prompts")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: what the reference is scored in, float32 on CPU and bfloat16 on a GPU"
    )
    engine_args: dict[str, Any] = Field(
        default_factory=dict,
        description="further arguments of vLLM's engine: {enforce_eager: true} samples without CUDA graphs",
    )
    baseline: str | None = Field(
        None, description="model that stands for the reference in stage three; default: the configured reference"
    )
    models: dict[str, str] = Field(
        default_factory=dict,
        description="further models to judge, name: model directory, PEFT adapter, Hub id, embedded:<name> or run:<run>",
    )
    compare: Literal["all", "reference"] = Field(
        "all",
        description="which models judges compare: all: every two; reference: each with the reference, fewer verdicts",
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


class Config(Section):
    """Everything one experiment is made of."""

    data: DataConfig
    reference: ReferenceConfig = ReferenceConfig()
    policy: PolicyConfig = PolicyConfig()
    train: TrainConfig = TrainConfig()
    generate: GenerateConfig = GenerateConfig()
    rollout: RolloutConfig = RolloutConfig()
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
        if self.policy.dtype == "bfloat16" and self.train.optimizer == "adafactor":
            problems.append("policy.dtype=bfloat16 needs an optimizer that rounds by chance: adamw or adamw_8bit")
        if self.policy.dtype == "bfloat16" and self.train.of_scores:
            problems.append(f"policy.dtype=bfloat16 is for policies: a {self.train.objective} model learns in float32")
        if self.policy.dtype == "bfloat16" and self.train.precision == "float32":
            problems.append("policy.dtype=bfloat16 computes in bfloat16: train.precision=float32 does not fit it")
        problems += _import_problems(self.reference)
        # if scores are imported, vLLM scores the new sequences of stage three
        if self.reference.tensor_parallel_size > 1 and self.reference.engine == "transformers":
            problems.append("reference.tensor_parallel_size spreads vLLM's model: it needs reference.engine=vllm")
        if self.reference.kv_cache_gib is not None and self.reference.engine == "transformers":
            problems.append("reference.kv_cache_gib is the size of vLLM's cache: it needs reference.engine=vllm")
        if self.reference.engine_args and self.reference.engine == "transformers":
            problems.append("reference.engine_args are vLLM's: they need reference.engine=vllm")
        problems += [
            f"{section}.engine_args: {name} is set by {OWN_ENGINE_ARGS[name]}"
            for section, given in (("reference", self.reference), ("generate", self.generate))
            for name in given.engine_args
            if name in OWN_ENGINE_ARGS
        ]
        shown = [judge.shown for judge in self.judge]
        problems += [
            f"judge {name!r} is listed twice: give one a label" for name in set(shown) if shown.count(name) > 1
        ]
        named = {"generate.pair_judge": self.generate.pair_judge, "rollout.judge": self.rollout.judge}
        problems += [
            f"{field}: {problem}"
            for field, judge_name in named.items()
            if judge_name is not None
            and (judge_name == IMPLICIT or judge_name not in shown)
            and (problem := pair_judge_problem(judge_name))
        ]
        problems += [
            f"generate.models: {name!r} cannot name a model: letters, digits, '.', '_' and '-', none of {', '.join(TAKEN)}"
            for name in self.generate.models
            if name in TAKEN or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _import_problems(reference: ReferenceConfig) -> list[str]:
    name = reference.imported_by
    if reference.engine != "imported":
        return ["reference.imported_by is read with reference.engine=imported only"] if name is not None else []
    if name is None:
        return ["reference.engine=imported needs reference.imported_by: the name that 'refscore import --by' was given"]
    if not name.isprintable() or name != name.strip() or not 0 < len(name) <= _LONGEST_NAME:
        return [
            f"reference.imported_by {name[:_LONGEST_NAME]!r}: 1 to {_LONGEST_NAME} characters on a line, no space around them"
        ]
    return []


def without_reference(config: Config) -> Config:
    """The configuration of an experiment that compares with no reference: the policy stands for it, as far as token ids go."""
    policy = config.policy
    stands = {"model": policy.model, "revision": policy.revision, "trust_remote_code": policy.trust_remote_code}
    return config.model_copy(update={"reference": config.reference.model_copy(update={**stands, "adapter": None})})
