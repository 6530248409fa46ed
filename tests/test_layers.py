"""Rules of the layout that no other test would notice."""

import ast
import re

import pytest

from tests.conftest import ROOT

SOURCES = sorted([*(ROOT / "pipeline").glob("*.py"), *(ROOT / "stages").glob("*.py")])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_file_keeps_its_place(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree) or not tree.body
    if path.parent.name == "pipeline":
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not any((name or "").startswith("stages") for name in imported)
        assert "sys.argv" not in text
        assert not re.search(r"\bprint\(", text)
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not called & {"eval", "exec", "torch.load", "torch.save", "pickle.load", "pickle.loads"}


def test_the_configuration_is_read_somewhere():
    """A field that nothing reads is a silent no-op."""
    from pipeline.config import Config

    code = "\n".join(path.read_text() for path in SOURCES if path.name != "config.py")
    for section, field in Config.model_fields.items():
        for name in getattr(field.annotation, "model_fields", {}):
            assert re.search(rf"\.{name}\b", code), f"{section}.{name}"
