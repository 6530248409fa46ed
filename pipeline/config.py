"""One experiment's configuration: declared here once, strict, every problem reported at once.

Owns the fields, their meaning and their limits. Refuses unknown keys (naming the nearest known one), values out of
range and combinations that make no sense. Reads YAML and `key=value` overrides; imports neither torch nor vLLM.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import ConfigError

PRESETS = Path(__file__).parent / "presets"


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


OneOrMore = Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


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
    tokens_per_shard: int | None = Field(
        None, ge=1, description="tokens scored between two publications; default 16384 on CPU, 1048576 on a GPU"
    )
    max_batched_tokens: int | None = Field(
        None, ge=16, description="tokens in one forward pass; default: what a 1 GiB block of logits allows"
    )
    kv_cache_gib: float | None = Field(None, gt=0, description="vLLM's key-value cache on CPU; default: what is needed")


class PolicyConfig(_Section):
    """The model that is trained."""

    model: str = Field("embedded:smollm2-135m-instruct", description="local directory, Hub id or embedded:<name>")
    revision: str | None = Field(None, description="Hub revision")
    trust_remote_code: bool = Field(False, description="run code that comes with the model; needs a full revision")


class TrainConfig(_Section):
    """Optimisation; names as in TRL where TRL has one."""

    beta: float = Field(0.1, gt=0, description="temperature of the implicit reward")
    loss_type: Literal["sigmoid"] = Field("sigmoid", description="preference loss")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of labels taken to be flipped (cDPO)")
    layout: Literal["tree", "separate"] = Field(
        "tree", description="tree: the prompt is read once for both responses; separate: two sequences"
    )
    precision: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="autocast over float32 weights; auto = bfloat16"
    )
    learning_rate: float = Field(1e-6, gt=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field("linear", description="after the warm-up")
    warmup_ratio: float = Field(0.1, ge=0, le=1, description="share of the steps that warm up linearly")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    per_device_train_batch_size: int = Field(4, ge=1, description="pairs in one forward pass")
    per_device_eval_batch_size: int = Field(8, ge=1, description="pairs in one forward pass of evaluation")
    gradient_accumulation_steps: int = Field(2, ge=1, description="forward passes in one optimizer step")
    num_train_epochs: float = Field(1.0, gt=0, description="passes over the pairs")
    max_steps: int = Field(-1, ge=-1, description="optimizer steps; -1: as the epochs give")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, more time")
    seed: int = Field(0, ge=0, description="order of the pairs, dropout")
    logging_steps: int = Field(1, ge=1)
    eval_steps: int = Field(50, ge=0, description="evaluate every so many steps; 0 = only before and after")
    save_steps: int = Field(50, ge=0, description="checkpoint every so many steps; 0 = only at the end")
    save_total_limit: int = Field(1, ge=1, description="checkpoints kept")


class GenerateConfig(_Section):
    """Sampling from policy and reference on the held-out prompts."""

    max_tokens: int = Field(256, ge=1, description="longest response, in tokens")
    temperature: float = Field(0.7, ge=0)
    top_p: float = Field(1.0, gt=0, le=1, description="below 1: from the likeliest tokens only; slow on CPU")
    samples: int = Field(1, ge=1, description="responses for each prompt and model")
    seed: int = Field(0, ge=0)
    max_prompts: int | None = Field(None, ge=1, description="at most so many held-out prompts")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto = bfloat16")


class Config(_Section):
    """Everything one experiment is made of."""

    data: DataConfig
    reference: ReferenceConfig = ReferenceConfig()
    policy: PolicyConfig = PolicyConfig()
    train: TrainConfig = TrainConfig()
    generate: GenerateConfig = GenerateConfig()
    judge: OneOrMore = Field(
        default=["implicit", "rule:complete_and_concise", "rule:no_repetition"],
        description="implicit, rule:<name>",
    )

    @model_validator(mode="after")
    def _sensible(self) -> Config:
        problems = [
            f"{name}.trust_remote_code needs {name}.revision as a full 40-digit commit, got {section.revision!r}"
            for name, section in (("reference", self.reference), ("policy", self.policy))
            if section.trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", section.revision or "")
        ]
        # judges import nothing heavy; the registry says which names exist
        from pipeline.judges import check_judge_name

        problems += [problem for name in self.judge if (problem := check_judge_name(name))]
        if problems:
            raise ValueError("; ".join(problems))
        return self


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read `path`, apply `section.field=value` overrides, validate.

    Raises ConfigError that lists every problem found in file and overrides.
    """
    path = Path(path)
    if not path.is_file():
        shipped = ", ".join(sorted(str(p) for p in PRESETS.glob("*.yaml")))
        raise ConfigError(f"configuration {str(path)!r} does not exist; shipped presets: {shipped}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable as YAML: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold sections ({', '.join(Config.model_fields)}), got {type(content).__name__}")
    return load_overrides(content, overrides, str(path))


def load_overrides(
    content: dict[str, Any], overrides: list[str] | tuple[str, ...], name: str = "configuration"
) -> Config:
    """Apply overrides to plain values and validate; `name` says in messages where the values are from."""
    problems = [problem for override in overrides if (problem := _apply(content, override))]
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        problems += [_explain(dict(item)) for item in error.errors()]
    if problems:
        raise ConfigError(f"{name}: {_listed(problems)}")
    return config


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal value."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def digest(*parts: BaseModel | dict[str, Any] | str) -> str:
    """sha256 (hex) of sections or values in canonical JSON."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def differing_fields(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Names and values of the fields that two dumped configurations do not share, one string each."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name), new.get(name)
        if isinstance(was, dict) and isinstance(now, dict):
            found += differing_fields(was, now, f"{prefix}{name}.")
        elif was != now:
            found.append(f"{prefix}{name}: {was!r} -> {now!r}")
    return found


def _apply(content: dict[str, Any], override: str) -> str | None:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        return f"--set {override!r} is not of the form section.field=value"
    try:
        value = _number_or(yaml.safe_load(text))
    except yaml.YAMLError as error:
        return f"--set {override!r}: the value is not readable as YAML: {_one_line(error)}"
    target = content
    for key in keys[:-1]:
        if target.get(key) is None:
            target[key] = {}
        target = target[key]
        if not isinstance(target, dict):
            return f"--set {override!r}: {key!r} has no fields"
    target[keys[-1]] = value
    return None


def _number_or(value: Any) -> Any:
    # YAML 1.1 reads 1e-6 as a string
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


def _explain(item: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(where, _known_names(), n=1, cutoff=0.5)
        return f"unknown key {where!r}" + (f", did you mean {near[0]!r}?" if near else "")
    if item["type"] == "missing":
        return f"{where!r} is missing"
    message = item["msg"].removeprefix("Value error, ")
    return f"{where}: {message}, got {item['input']!r}" if where else message


def _known_names() -> list[str]:
    names = []
    for section, field in Config.model_fields.items():
        names.append(section)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += [f"{section}.{name}" for name in field.annotation.model_fields]
    return names


def _listed(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems\n" + "\n".join(f"  - {problem}" for problem in problems)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
