"""The README's map is that of the packages, and CI runs the command it names. Other rules of pages: test_docs.py."""

import ast
import re

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_the_map_names_every_package_in_its_own_words():
    packages = sorted((ROOT / "pipeline").glob("**/__init__.py"))
    shown = dict(re.findall(r"^  (\w+(?:/\w+)*)/ +(.+)$", README, re.MULTILINE))
    for file in packages[1:]:
        name = file.parent.relative_to(ROOT / "pipeline").as_posix()
        assert shown.pop(name) == (ast.get_docstring(ast.parse(file.read_text())) or "").splitlines()[0]
    assert set(shown) == {"presets"}


def test_ci_runs_the_readmes_test_command():
    assert "`make test`" in README
    assert "make test" in (ROOT / ".ci" / "run").read_text()
