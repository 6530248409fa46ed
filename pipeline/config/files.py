"""A configuration as people write it: a YAML file and `section.field=value` overrides, and back.

Every problem is reported at once, an unknown key with the nearest known one. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.config.experiment import Config
from pipeline.config.training import LoraConfig
from pipeline.errors import ConfigError

PRESETS = Path(__file__).parent.parent / "presets"


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read `path`, a file or the name of a preset ("demo"), apply `section.field=value` overrides, validate.

    Raises ConfigError that lists every problem found in file and overrides.
    """
    path = _preset(path) or Path(path)
    if not path.is_file():
        shipped = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.yaml")))
        raise ConfigError(f"configuration {str(path)!r} does not exist; shipped presets: {shipped}")
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable as YAML: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold sections ({', '.join(Config.model_fields)}), got {type(content).__name__}")
    return load_overrides(content, overrides, str(path))


def _preset(name: str | Path) -> Path | None:
    path = PRESETS / f"{name}.yaml"
    return path if not Path(name).is_file() and path.parent == PRESETS and path.is_file() else None


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
    text = io.StringIO()
    _yaml().dump(config.model_dump(mode="json"), text)
    return text.getvalue()


def read_yaml(text: str) -> Any:
    """The plain values of a YAML 1.2 document, in which 1e-6 is a number and `on` a string. Raises YAMLError."""
    return _yaml().load(text)


def _yaml() -> YAML:
    # pure: the C library knows YAML 1.1 alone
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # declared as None
    yaml.width = 100
    return yaml


def digest(*parts: BaseModel | dict[str, Any] | str) -> str:
    """sha256 (hex) of sections or values in canonical JSON."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def differing_fields(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Names and values of the fields that two dumped configurations do not share, one string each."""
    fields = []
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name), new.get(name)
        if isinstance(was, dict) and isinstance(now, dict):
            fields += differing_fields(was, now, f"{prefix}{name}.")
        elif was != now:
            fields.append(f"{prefix}{name}: {was!r} -> {now!r}")
    return fields


def _apply(content: dict[str, Any], override: str) -> str | None:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        return f"--set {override!r} is not of the form section.field=value"
    try:
        value = read_yaml(text)
    except YAMLError as error:
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


def _explain(item: dict[str, Any]) -> str:
    field = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, _known_names(), n=1, cutoff=0.5)
        return f"unknown key {field!r}" + (f", did you mean {near[0]!r}?" if near else "")
    if item["type"] == "missing":
        return f"{field!r} is missing, set it in the file or with --set {field}=VALUE"
    message = item["msg"].removeprefix("Value error, ")
    if not field or isinstance(item["input"], dict):  # what is wrong with a section as a whole says its values
        return f"{field}: {message}" if field else message
    return f"{field}: {message}, got {item['input']!r}"


def _known_names() -> list[str]:
    names = []
    for section, field in Config.model_fields.items():
        names.append(section)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += [f"{section}.{name}" for name in field.annotation.model_fields]
    return names + [f"policy.lora.{name}" for name in LoraConfig.model_fields]


def _listed(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems\n" + "\n".join(f"  - {problem}" for problem in problems)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
