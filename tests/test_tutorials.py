"""The tutorials are run as they are written, on a tiny model and forty pairs; `make tutorials` runs them with vLLM."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT, make_tiny_model, preference_rows, write_rows
from tests.forked import run

PAGES = sorted((ROOT / "docs/tutorials").glob("*.md"))
WHOLE = bool(os.environ.get("REFSCORE_TUTORIALS"))
# the others take minutes
ALWAYS: tuple[str, ...] = ()
_BLOCK = re.compile(r"```(sh|python)\n(.*?)```", re.DOTALL)


def test_every_tutorial_is_listed():
    index = (ROOT / "docs/index.md").read_text()
    assert len(PAGES) == 6
    for page in PAGES:
        assert f"(tutorials/{page.name})" in index
    assert "`make tutorials` runs all, `make test` the notebook alone." in index


@pytest.mark.engine
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_tutorial_runs_word_for_word(page, tmp_path):
    if not WHOLE and page.stem not in ALWAYS:
        pytest.skip("make tutorials runs this one: it takes minutes")
    make_tiny_model(tmp_path / "my/model", max_position_embeddings=2048)
    write_rows(tmp_path / "my_pairs.jsonl", preference_rows(120))
    programs = tmp_path / "bin"
    programs.mkdir()
    command = programs / "refscore"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m stages.cli "$@"\n')
    command.chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hub"),
    }  # fmt: skip
    for language, text in _BLOCK.findall(page.read_text()):
        code = [sys.executable, "-c", text] if language == "python" else ["bash", "-e", "-c", text]
        done = subprocess.run(
            code,
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-4000:]}"
        assert "Traceback" not in done.stdout


@pytest.mark.engine
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path):
    """Its code cells in one process, with a tiny model in place of the one that it names."""
    make_tiny_model(tmp_path / "tiny", max_position_embeddings=2048)
    notebook = json.loads((ROOT / "docs/example.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    code, times = re.subn(r"^MODEL = .*$", 'MODEL = "tiny"', "\n".join(cells), flags=re.MULTILINE)
    assert times == 1
    # its tokens are short: more of them stand in a pair than the demo's limit allows
    code = code.replace('"data.max_rows=24"', '"data.max_rows=24", "data.max_length=1024"')
    done = run(tmp_path, code)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "0 of" not in done.stdout.splitlines()[0]
    assert (tmp_path / "data/runs/notebook/report.html").is_file()


def test_the_notebook_keeps_no_output():
    """What a cell printed on one machine is no part of the repository."""
    notebook = json.loads((ROOT / "docs/example.ipynb").read_text())
    assert not [cell for cell in notebook["cells"] if cell.get("outputs") or cell.get("execution_count")]
