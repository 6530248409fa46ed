"""The pages say what is so: links and targets exist, generated parts are fresh, code is valid, every name is shown."""

import re
import subprocess
import sys

import pytest

import pipeline
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def named(path):
    return path.name


def anchors(page):
    """Headings as links name them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_there_are_pages():
    assert len(PAGES) >= 11


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    for line in re.findall(r"(?:^|`)make ([a-z -]+)", page.read_text(), re.MULTILINE):
        for target in line.split():
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_code_compiles_and_uses_names_that_exist(page):
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        compile(code, page.name, "exec")
        for names in re.findall(r"^from pipeline import (.+)$", code, re.MULTILINE):
            assert {name.strip() for name in names.split(",")} <= set(pipeline.__all__)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_files_that_are_named_exist(page):
    for name in re.findall(r"`((?:pipeline|stages|tests|docs)/[\w/.]+\.\w+)`", page.read_text()):
        assert (ROOT / name).exists(), name


def test_what_is_generated_is_fresh():
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_name_of_the_library_is_shown():
    page = (ROOT / "docs" / "python.md").read_text()
    for name in set(pipeline.__all__) - {"__version__"}:
        assert f"| `{name}` |" in page, name


def test_the_table_of_places_names_files_that_exist_and_no_file_twice():
    rows = re.findall(r"^\| (.+) \| `(\S+)` \|$", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    assert len(rows) >= 25
    assert all((ROOT / "pipeline" / file).is_file() for _, file in rows)
    assert len({file for _, file in rows}) == len(rows)


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 175
