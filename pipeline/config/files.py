"""A configuration as people write it: a YAML file and `section.field=value` overrides, and back.

Every problem is reported at once and blamed on what it comes from, the file or one `--set`; an unknown key with the nearest
known one. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import logging
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from ruamel.yaml.error import YAMLError

from pipeline.config.documents import read_yaml, unclear_numbers, write_yaml
from pipeline.config.experiment import Config
from pipeline.config.rollouts import PolicyGradientConfig
from pipeline.config.training import LoraConfig
from pipeline.errors import ConfigError, first_line

log = logging.getLogger(__name__)

PRESETS = Path(__file__).parent.parent / "presets"
NEUTRAL = "neutral"

# where the next override may begin in a text that holds several: at white space before section.field=, or before judge=
_NEXT = re.compile(rf"\s+(?=(?:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+|{'|'.join(Config.model_fields)})\s*=)")


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
        raise ConfigError(f"{path} is not readable as YAML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold sections ({', '.join(Config.model_fields)}), got {type(content).__name__}")
    config = load_overrides(content, overrides, str(path))
    if path.parent == PRESETS and path.stem != NEUTRAL:
        _warn_of_other_data(path.stem, config)
    return config


def _warn_of_other_data(preset: str, config: Config) -> None:
    # a later round's pairs are of the same kind as the first one's
    other = [
        name for name in config.data.path if not name.startswith("embedded:") and Path(name).name != "new_pairs.jsonl"
    ]
    if other:
        _warn(
            f"the settings of the preset {preset} are those of its own data (data.max_length={config.data.max_length}, "
            f"train.beta={config.train.beta:g}, train.learning_rate={config.train.learning_rate:g}, and others): for "
            f"{other[0]} 'refscore init' writes a configuration, or take --config {NEUTRAL}"
        )


@cache
def _warn(text: str) -> None:
    """Once per process, however often a configuration is read."""
    log.warning(text)


def _preset(name: str | Path) -> Path | None:
    path = PRESETS / f"{name}.yaml"
    return path if not Path(name).is_file() and path.parent == PRESETS and path.is_file() else None


class _Problem(NamedTuple):
    """What is wrong, and the keys from the top to the field that it is about."""

    place: tuple[str, ...]
    text: str


def load_overrides(
    content: dict[str, Any], overrides: list[str] | tuple[str, ...], name: str = "configuration"
) -> Config:
    """Apply overrides to plain values and validate; `name` says in messages where the values are from."""
    before = copy.deepcopy(content)
    refused: list[str] = []
    given: dict[tuple[str, ...], str] = {}
    for override in split_overrides(overrides):
        keys = tuple(key.strip() for key in override.partition("=")[0].split("."))
        if problem := _apply(content, keys, override):
            refused.append(f"--set {override!r}: {problem}")
        else:
            given[keys] = override
    checked = _checked(content)
    if isinstance(checked, Config) and not refused:
        return checked
    found = checked if isinstance(checked, list) else []
    of_file = _checked(before) if given else found
    said = [_blamed(problem, given, of_file if isinstance(of_file, list) else []) for problem in found]
    in_file = [problem.text for problem, override in zip(found, said, strict=True) if override is None]
    refused += [f"{blame}: {problem.text}" for problem, blame in zip(found, said, strict=True) if blame is not None]
    if not refused:
        raise ConfigError(f"{name}: {_listed(in_file)}")
    raise ConfigError(_listed([*(f"{name}: {text}" for text in in_file), *refused]))


def split_overrides(overrides: list[str] | tuple[str, ...]) -> list[str]:
    """One override each, where a text holds several: "train.beta=1 data.path=my file.jsonl" is two.

    It is cut at white space before the next section.field= where what stands before is a whole value; so brackets and quotes hold
    together.
    """
    parts = []
    for override in overrides:
        start = 0
        for match in _NEXT.finditer(override):
            if start < match.start() and _is_whole(override[start : match.start()]):
                parts.append(override[start : match.start()].strip())
                start = match.end()
        parts.append(override[start:].strip())
    return parts


def _is_whole(override: str) -> bool:
    try:
        read_yaml(override.partition("=")[2])
    except YAMLError:
        return False
    return True


def _apply(content: dict[str, Any], keys: tuple[str, ...], override: str) -> str | None:
    """Write one override into `content`; what is wrong with it if it cannot be."""
    _, equals, text = override.partition("=")
    if not equals or not all(keys):
        return "not of the form section.field=value, for example train.beta=0.05"
    if not text.strip():
        return "no value after '=': write null for none, \"''\" for an empty text"
    try:
        value = read_yaml(text)
    except YAMLError as error:
        return f"the value is not readable as YAML: {error}"
    target = content
    for key in keys[:-1]:
        if target.get(key) is None:
            target[key] = {}
        target = target[key]
        if not isinstance(target, dict):
            return f"{key!r} is {target!r}, which has no fields"
    target[keys[-1]] = value
    return None


def _checked(content: dict[str, Any]) -> Config | list[_Problem]:
    """The configuration, or all that is wrong with it."""
    problems = [_Problem(place, f"{'.'.join(place)}: {text}") for place, text in unclear_numbers(content)]
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        known = {problem.place for problem in problems}
        found = [(tuple(map(str, item["loc"])), dict(item)) for item in error.errors()]
        problems += [_Problem(place, _explain(item)) for place, item in found if place not in known]
        return problems
    return problems or config


def _blamed(problem: _Problem, given: dict[tuple[str, ...], str], of_file: list[_Problem]) -> str | None:
    """The override that a problem comes from, as it is to be named; None if the file has it by itself."""
    here = [override for keys, override in given.items() if problem.place[: len(keys)] == keys]
    if here:
        return f"--set {here[-1]!r}"
    if problem in of_file or not given:
        return None
    # a combination: of the section's overrides, or of all
    within = [override for keys, override in given.items() if keys[: len(problem.place)] == problem.place]
    return " ".join(f"--set {override!r}" for override in within or given.values())


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal value."""
    return write_yaml(config.model_dump(mode="json"))


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
    within: dict[str, type[BaseModel]] = {"policy.lora": LoraConfig, "train.policy_gradient": PolicyGradientConfig}
    return names + [f"{place}.{name}" for place, section in within.items() for name in section.model_fields]


def _listed(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems\n" + "\n".join(f"  - {problem}" for problem in problems)
