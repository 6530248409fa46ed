"""What every section of the configuration has in common: strict, never changed, no truth value taken for a number."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


def as_list(value: object) -> object:
    """One value where several may stand, as a list of one."""
    return [value] if isinstance(value, str | dict) else value


class Section(BaseModel):
    """A part of the configuration: strict, and never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_truth_value(cls, value: object, info: ValidationInfo) -> object:
        # pydantic takes true for 1
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        values = value if isinstance(value, list) else [value]
        if kinds & {int, float} and bool not in kinds and any(isinstance(one, bool) for one in values):
            raise ValueError("true and false are no numbers")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of, down to the innermost."""
    inner = get_args(annotation)
    return set().union(*map(_kinds, inner)) if inner else {annotation} if isinstance(annotation, type) else set()


def changed(section: BaseModel) -> set[str]:
    """Fields that differ from their defaults."""
    fields = type(section).model_fields
    return {name for name in fields if getattr(section, name) != fields[name].get_default(call_default_factory=True)}
