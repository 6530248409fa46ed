"""What a run's own record says, also where somebody's hand was in it."""

import pytest

from pipeline.artifacts.runs import existing_runs, finished_stages, open_run, record, uses_of_references
from pipeline.artifacts.states import state_of
from pipeline.config.files import load_config
from tests.conftest import refscore_here


@pytest.mark.parametrize("content", ["garbage", "[]", '{"stages": 5, "digests": 7}', '{"stages": {"train": 5}}'])
def test_a_provenance_that_is_none_says_nothing_and_is_written_anew(tmp_path, content):
    run = open_run("r")
    run.directory.mkdir(parents=True)
    run.provenance.write_text(content)
    run.config.write_text("")
    assert finished_stages(run) == {}
    assert state_of(run).state == "begun"
    uses_of_references()
    record(run, load_config("demo"), "precompute", digests={"data": "d"})
    assert list(finished_stages(run)) == ["precompute"]


def test_what_is_half_deleted_is_no_run(tmp_path):
    for name in (".tmp-1-aa-old", "r"):
        (tmp_path / "data/runs" / name).mkdir(parents=True)
        (tmp_path / "data/runs" / name / "config.yaml").touch()
    assert existing_runs() == ["r"]


def test_a_file_that_is_no_text_is_a_message(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\x84\x00")
    assert "x.txt is no text in UTF-8" in refscore_here(tmp_path, "show", "x.txt", code=3)
