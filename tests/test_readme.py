"""What the README says is so: links lead somewhere, make targets exist. Its snippets run in tests/stages/test_pipeline.py."""

import re

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_make_target_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    for line in re.findall(r"(?:^|`)make ([a-z -]+)", README, re.MULTILINE):
        for target in line.split():
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_source_file_stands_in_the_tree():
    named = set(re.findall(r"[\w-]+\.py", README))
    sources = [path for path in (ROOT / "pipeline").rglob("*.py") if path.name != "__init__.py"]
    assert len(sources) > 80
    assert {path.name for path in sources} <= named


def test_ci_runs_the_readmes_test_command():
    assert "`make test`" in README
    assert "make test" in (ROOT / ".ci" / "run").read_text()
