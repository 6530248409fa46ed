"""Rules of the layout that no other test would notice."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT

SOURCES = sorted([*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "stages").rglob("*.py")])


def named(path):
    return str(path.relative_to(ROOT))


def imported(tree: ast.Module) -> Iterator[str]:
    """Every module that a file imports, inside functions and for types alone too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_there_are_sources_to_look_at():
    assert len(SOURCES) > 110


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_a_file_keeps_its_place(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree) or not tree.body
    if path.relative_to(ROOT).parts[0] == "pipeline":
        assert not [module for module in imported(tree) if module.split(".")[0] in {"stages", "tests"}]
        assert "sys.argv" not in text
        assert not re.search(r"\bprint\(", text)
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not called & {"eval", "exec", "torch.load", "torch.save", "pickle.load", "pickle.loads"}
