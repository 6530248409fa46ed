"""How the wheel is laid out: `pipeline` and `stages` become `refscore.pipeline` and `refscore.stages`.

In a checkout the two stand at the top. In site-packages names as common as these would meet those of other projects, so
the wheel holds one package, `refscore`, and imports are written anew as files are packed: import statements, and texts that
name a module whole. An editable installation keeps the checkout's layout, and `import refscore` works there too.
"""

from __future__ import annotations

import io
import re
import tempfile
import tokenize
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGES = ("pipeline", "stages")
# files of the checkout that come with the package
DATA = {"data/bad_rule": "refscore/pipeline/presets/bad_rule", "data/demo": "refscore/pipeline/presets/demo"}
_IMPORT = re.compile(rf"^(\s*from\s+)({'|'.join(PACKAGES)})\b", re.MULTILINE)
_PLAIN = re.compile(rf"^\s*import\s+({'|'.join(PACKAGES)})\b.*$", re.MULTILINE)
_MODULE = re.compile(rf"([\"'])({'|'.join(PACKAGES)})((?:\.\w+)+)\1")

_FRONT = '''"""refscore: score a DPO reference model once, train the policy alone, judge the result.

`from refscore import ...` gives what docs/python.md shows; names are imported when they are first used.
"""

from __future__ import annotations

from typing import Any

from {pipeline} import __all__, __version__


def __getattr__(name: str) -> Any:
    import {pipeline} as library

    if name in __all__:
        return getattr(library, name)
    raise AttributeError(f"module 'refscore' has no attribute {{name!r}}")


def __dir__() -> list[str]:
    return sorted(__all__)


def main() -> None:
    """The command line."""
    from {stages}.cli import main as run

    run()
'''
_RUN = "from refscore import main\n\nmain()\n"


def renamed(source: str) -> str:
    """A file's text with `pipeline` and `stages` below `refscore`: in imports, and in strings that are a module's name."""
    if plain := _PLAIN.search(source):
        raise ValueError(f"{plain[0].strip()!r} would bind another name in the wheel: write 'from ... import ...'")
    text = _IMPORT.sub(r"\1refscore.\2", source)
    lines = text.splitlines(keepends=True)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    strings = [token for token in tokens if token.type == tokenize.STRING and _MODULE.fullmatch(token.string)]
    for token in reversed(strings):
        row, begin, end = token.start[0] - 1, token.start[1], token.end[1]
        lines[row] = lines[row][:begin] + _MODULE.sub(r"\1refscore.\2\3\1", token.string) + lines[row][end:]
    return "".join(lines)


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Called by hatchling; see the file's first lines."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        self._made = tempfile.TemporaryDirectory()
        made = Path(self._made.name)
        if version == "editable":
            front = _FRONT.format(pipeline="pipeline", stages="stages")
            build_data["force_include_editable"] = _written(made, front)
            return
        included = build_data["force_include"]
        included |= _written(made, _FRONT.format(pipeline="refscore.pipeline", stages="refscore.stages"))
        for package in PACKAGES:
            for file in sorted((root / package).rglob("*")):
                if file.is_dir() or "__pycache__" in file.parts:
                    continue
                place = f"refscore/{file.relative_to(root).as_posix()}"
                if file.suffix == ".py":
                    copy = made / place
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    copy.write_text(renamed(file.read_text(encoding="utf-8")), encoding="utf-8")
                    included[str(copy)] = place
                else:
                    included[str(file)] = place
        included |= {str(root / source): place for source, place in DATA.items()}

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002  # hatchling's
        self._made.cleanup()


def _written(made: Path, front: str) -> dict[str, str]:
    files = {"refscore/__init__.py": front, "refscore/__main__.py": _RUN, "refscore/py.typed": ""}
    for place, text in files.items():
        path = made / "front" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return {str(made / "front" / place): place for place in files}
