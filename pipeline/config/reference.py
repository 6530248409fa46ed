"""The fields of a configuration as people look them up: name, type, default, limits, meaning; and as a JSON schema."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from pipeline.config.experiment import Config
from pipeline.config.judges import JudgeConfig
from pipeline.config.rollouts import PolicyGradientConfig
from pipeline.config.training import LoraConfig

_LIMITS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


@dataclass(frozen=True)
class FieldFacts:
    """What is declared of a field. `name`: as `--set` takes it; `default` and `limits` as text, empty if there is none."""

    name: str
    type: str
    default: str
    limits: str
    says: str

    @property
    def meaning(self) -> str:
        """Meaning and limits in one line."""
        return "; ".join(filter(None, [self.says, self.limits]))


def sections() -> dict[str, type[BaseModel]]:
    """Every section by its name, in order; `policy.lora`, `train.policy_gradient` and `judge` after those that hold them."""
    found: dict[str, type[BaseModel]] = {}
    for name, field in Config.model_fields.items():
        found[name] = JudgeConfig if name == "judge" else field.annotation  # type: ignore[assignment]  # all others are sections
        if name == "policy":
            found["policy.lora"] = LoraConfig
        if name == "train":
            found["train.policy_gradient"] = PolicyGradientConfig
    return found


def fields_of(section: type[BaseModel], prefix: str = "") -> Iterator[FieldFacts]:
    """The fields of a section, in order; `prefix` comes before their names."""
    for name, field in section.model_fields.items():
        default = field.get_default(call_default_factory=True)
        limits = ", ".join(
            f"{sign} {value:g}"
            for part in field.metadata
            for word, sign in _LIMITS
            if (value := getattr(part, word, None)) is not None
        )
        shown = "required" if default is PydanticUndefined else _plain(default)
        yield FieldFacts(prefix + name, _type(field.annotation), shown, limits, field.description or "")


def schema() -> dict[str, Any]:
    """A JSON schema (draft 2020-12) of configuration files, for editors: what is declared, and one value where a list may stand."""
    made = Config.model_json_schema()
    lists = ("path", "store", "loss_type")
    for section in made["$defs"].values():
        for name, field in section.get("properties", {}).items():
            if name in lists and field.get("type") == "array":
                one = {key: field.pop(key) for key in ("type", "items", "minItems") if key in field}
                field["anyOf"] = [one["items"], one]
    judge = made["properties"]["judge"]
    one = {key: judge.pop(key) for key in ("type", "items", "minItems")}
    named = {"anyOf": [{"type": "string"}, one["items"]]}
    judge["anyOf"] = [named, {**one, "items": named}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


def _plain(default: Any) -> str:
    if isinstance(default, BaseModel):
        return "see below"
    if isinstance(default, bool) or default is None:
        return {True: "true", False: "false", None: "null"}[default]
    return ", ".join(map(str, default)) if isinstance(default, list) else str(default) if default != {} else "{}"


def _type(annotation: Any) -> str:
    """A type in words: 'a or b or null', 'number', 'list of text'."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inner[0])
    if origin is Literal:
        return " or ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(one) for one in inner))
    if origin is list:
        return f"list of {_type(inner[0])}"
    if origin is dict:
        return f"map of {_type(inner[0])} to {_type(inner[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    known = {
        str: "text",
        int: "whole number",
        float: "number",
        bool: "true or false",
        type(None): "null",
        Any: "any value",
    }
    return known.get(annotation, str(annotation))
