"""`refscore view` as it is called: what it refuses before anything is served, and the folder that it writes."""

import json
import subprocess
import sys

import pytest

from pipeline.errors import ConfigError, RefscoreError
from stages import view
from tests.conftest import ROOT
from tests.view.runs import make_run, tree


@pytest.mark.parametrize(("asked", "problem"), [
    ({"run": "none"}, "run 'none' is not here; there are: one, unsampled"),
    ({"run": "../one"}, "run name '../one': letters, digits"),
    ({"run": ".."}, "run name '..'"),
    ({"vote": "anna"}, "--vote needs --run"),
    ({"run": "unsampled", "vote": "anna"}, "has no samples to vote on: run 'refscore eval' first"),
    ({"run": "one", "vote": "../anna"}, "voter '../anna': up to 64 letters"),
    ({"run": "one", "vote": ""}, "voter ''"),
    ({"run": "one", "vote": "anna", "bundle": "pages"}, "leave --vote out, or --bundle"),
])  # fmt: skip
def test_what_cannot_be_shown_is_a_message(asked, problem, tmp_path):
    make_run(prompts=2)
    make_run("unsampled", prompts=2).samples.unlink()
    before = tree(tmp_path)
    given = {"run": None, "vote": None, "bundle": None} | asked
    if given["bundle"]:
        given["bundle"] = tmp_path / given["bundle"]
    with pytest.raises(ConfigError) as error:
        view.main(port=0, seed=0, **given)
    assert problem in str(error.value)
    assert tree(tmp_path) == before


def test_there_may_be_no_runs(tmp_path):
    with pytest.raises(ConfigError, match="there are no runs here to write pages of"):
        view.main(None, 0, None, 0, tmp_path / "pages")
    with pytest.raises(ConfigError, match="run 'one' is not here; there are: none"):
        view.main("one", 0, None, 0, None)


def test_a_port_below_1024_that_nobody_may_take_is_a_message(monkeypatch):
    def forbidden(_self, _address):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("socket.socket.bind", forbidden)
    with pytest.raises(RefscoreError, match=r"port 80 cannot be taken \(Permission denied\): name another with --port"):
        view.main(None, 80, None, 0, None)


def test_a_folder_by_the_command(tmp_path):
    make_run(prompts=2)
    make_run("other", prompts=2).dropped.write_bytes(b"no parquet")
    command = [sys.executable, "-m", "stages.cli", "view", "--bundle", "pages"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "left out  runs/other/dropped.json: " in done.stdout
    written = json.loads((tmp_path / "pages" / "refscore-view.json").read_text())
    assert written["runs"] == ["one", "other"]
    assert f"pages     pages: {written['files']} files" in done.stdout
    assert "of one, other" in done.stdout
    assert "python -m http.server --directory pages" in done.stdout
    assert (tmp_path / "pages" / "data" / "compare" / "one" / "other.json").is_file()
