"""YAML as people write it, read strictly: what could be understood in two ways is refused, not guessed.

A key that is given twice, a number with a leading zero (eight to YAML 1.1, ten to YAML 1.2), a number that no field can hold.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, DuplicateKeyError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import Node, ScalarNode
from ruamel.yaml.representer import SafeRepresenter

_LARGEST = 2**63 - 1


class LeadingZero(str):
    """A number that was written with a leading zero, as it was written."""

    __slots__ = ()


class _Constructor(SafeConstructor):
    def construct_yaml_int(self, node: ScalarNode) -> Any:
        if re.fullmatch(r"[-+]?0[0-9_]+", node.value):
            return LeadingZero(node.value)
        return super().construct_yaml_int(node)

    def construct_object(self, node: Node, deep: bool = False) -> Any:  # noqa: FBT001, FBT002  # as it is overridden
        try:
            return super().construct_object(node, deep=deep)
        except LookupError:  # of a tag that the value does not fit: !!bool maybe
            tag = str(node.tag).removeprefix("tag:yaml.org,2002:")
            raise ConstructorError(None, None, f"{node.value!r} is no !!{tag}", node.start_mark) from None


class _Representer(SafeRepresenter):
    def represent_str(self, data: str) -> ScalarNode:
        # read back, line breaks that are no \n would be others
        style = '"' if re.search("[\x85\u2028\u2029]", data) else None
        node: ScalarNode = self.represent_scalar("tag:yaml.org,2002:str", data, style=style)
        return node


_Representer.add_representer(str, _Representer.represent_str)
_Constructor.add_constructor("tag:yaml.org,2002:int", _Constructor.construct_yaml_int)


def read_yaml(text: str) -> Any:
    """The plain values of a YAML 1.2 document, in which 1e-6 is a number and `on` a string. Raises YAMLError, in one line."""
    try:
        return _yaml().load(text)
    except DuplicateKeyError as error:
        raise YAMLError(f"{_place(error)}: {str(error.problem).partition(' with value ')[0]}; keep one") from None
    except MarkedYAMLError as error:
        raise YAMLError(f"{_place(error)}: {error.problem or error.context}") from None
    except RecursionError:
        raise YAMLError("nested too deeply") from None
    except (ValueError, YAMLError) as error:  # of a tag (!!int x), or a date that there is not
        raise YAMLError(" ".join(str(error).split())) from None


def write_yaml(content: Any) -> str:
    """The document that `read_yaml` reads back to equal values."""
    text = io.StringIO()
    _yaml().dump(content, text)
    return text.getvalue()


def unclear_numbers(content: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Where a number stands that is not taken as it was written, as keys from the top, and why."""
    # every container once: an alias may lead back to where it stands
    waiting: list[tuple[tuple[str, ...], Any]] = [((), content)]
    seen: set[int] = set()
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, dict | list):
            if id(value) in seen:
                continue
            seen.add(id(value))
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [((*place, str(key)), one) for key, one in inner]
        elif isinstance(value, LeadingZero):
            yield place, _two_readings(value)
        elif isinstance(value, int) and abs(value) > _LARGEST:
            yield place, f"larger than any number here may be, {_LARGEST}"


def _two_readings(written: str) -> str:
    plain = written.replace("_", "")
    if set(plain) & {"8", "9"} or not int(plain):
        return f"{written} has a leading zero: write {int(plain)}, or quote it if it is a text"
    return (
        f"{written} is {int(plain)} to some readers of YAML and {int(plain, 8)} to others: "
        f"write {int(plain)}, or {int(plain, 8)}, or quote it if it is a text"
    )


def _yaml() -> YAML:
    # pure: the C library knows YAML 1.1 alone
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # declared as None
    yaml.width = 100
    return yaml


def _place(error: MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return f"line {mark.line + 1}, column {mark.column + 1}" if mark is not None else "somewhere"
