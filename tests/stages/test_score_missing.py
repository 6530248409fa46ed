"""`precompute --plan-to` writes a plan once, `score-missing` scores it and plans nothing, and what does not fit is said."""

import pytest

from tests.conftest import experiment, preference_rows, refscore_here, write_rows

SMALL = ["--config", "experiment.yaml", "--set", "reference.tokens_per_shard=150"]


@pytest.fixture
def where(tmp_path, tiny_model):
    experiment(tmp_path, tiny_model, write_rows(tmp_path / "d.jsonl", preference_rows(8)))
    return tmp_path


@pytest.fixture
def job(where):
    return refscore_here(where, "precompute", *SMALL, "--run", "r", "--plan-to", "job")


def test_one_plan_is_written_scored_and_joined(where, job, monkeypatch):
    assert "0 hits, 16 misses" in job
    assert "job       job: 16 sequences to score" in job
    assert not (where / "data/runs/r").exists()
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.precompute.plan.Planning", lambda *_: pytest.fail("planned again"))
        said = refscore_here(where, "score-missing", "job", *SMALL)
    groups = len(list((where / "job/missing").iterdir()))
    assert groups > 2
    assert f"done      {groups} groups here, {groups} in all" in said
    assert "next      'refscore precompute'" in said
    assert "starting" not in refscore_here(where, "score-missing", "job", *SMALL)
    assert "nothing to score" in refscore_here(where, "precompute", *SMALL, "--run", "r")
    assert (where / "data/runs/r/pairs.parquet").is_file()


def test_a_plan_of_what_the_store_has_is_empty(where):
    refscore_here(where, "precompute", *SMALL, "--run", "r")
    assert "job       job: 0 sequences to score" in refscore_here(where, "precompute", *SMALL, "--plan-to", "job")
    assert "done      0 groups here, 0 in all" in refscore_here(where, "score-missing", "job", *SMALL)


@pytest.mark.usefixtures("job")
def test_what_does_not_fit_is_said(where):
    other = refscore_here(where, "score-missing", "job", *SMALL, "--set", "reference.dtype=bfloat16", code=2)
    assert "is a job for reference" in other
    assert "holds a job already" in refscore_here(where, "precompute", *SMALL, "--plan-to", "job", code=2)
    assert "give one" in refscore_here(where, "precompute", *SMALL, "--plan", "--plan-to", "other", code=2)
    assert not (where / "other").exists()
    assert "d.jsonl is a file" in refscore_here(where, "precompute", *SMALL, "--plan-to", "d.jsonl", code=2)
    assert "--plan-to nowhere" in refscore_here(where, "score-missing", "nowhere", *SMALL, code=3)
    free = refscore_here(where, "precompute", *SMALL, "--plan-to", "x", "--set", "train.loss_type=[simpo]", code=2)
    assert "compares nothing with the reference" in free
    imported = ["--set", "reference.engine=imported", "--set", "reference.imported_by=a"]
    assert "none can be computed" in refscore_here(where, "precompute", *SMALL, *imported, "--plan-to", "x", code=2)


def test_another_store_than_the_plans_is_said(where, job):
    elsewhere = ["--set", "reference.store=other"]
    said = refscore_here(where, "score-missing", "job", *SMALL, *elsewhere)
    assert f"store     {where}/other, while the plan was made against {where}/data/store" in said
    assert "while" not in job + refscore_here(where, "score-missing", "job", *SMALL)
