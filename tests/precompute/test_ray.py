"""Two actors of a local Ray, one killed in the middle: everything is scored, with the bits of one process; and what stops them."""

import json
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
from types import SimpleNamespace

import polars as pl
import pyarrow as pa
import pytest

from pipeline.artifacts.schemas import MISSING
from pipeline.config.experiment import ReferenceConfig
from pipeline.errors import ConfigError, RefscoreError
from pipeline.precompute.many import ray as cluster
from pipeline.precompute.many.job import Job, Result
from pipeline.precompute.many.ray import threads_of_each
from tests.conftest import ROOT, experiment, preference_rows, refscore_here, write_rows

pytest.importorskip("ray", reason="Ray is an optional dependency: the extra 'ray'")

EVERYTHING = bool(os.environ.get("REFSCORE_FAULTS"))
DRIVER = """
    import sys
    from pathlib import Path

    import psutil
    from pipeline.config.files import load_config
    from pipeline.precompute.launch import Outcome, score_windows
    from pipeline.precompute.many import ray as cluster
    from pipeline.precompute.plan import make_plan
    from pipeline.precompute.score import windows_of

    if __name__ == "__main__":
        config = load_config("experiment.yaml", ["reference.workers=2", "reference.tokens_per_shard=150", *sys.argv[1:]])
        plan = make_plan(config)
        inner, killed = cluster.score_shards, []

        def killing(target, shards, limit, on_shard, listener):
            def counted(*counts):
                on_shard(*counts)
                if not killed:
                    mine = psutil.Process().children(recursive=True)
                    actors = [one for one in mine if "ScoringActor" in " ".join(one.cmdline())]
                    assert len(actors) == 2, [one.cmdline() for one in mine]
                    killed.append(actors[0].pid)
                    actors[0].kill()

            return inner(target, shards, limit, counted, listener)

        cluster.score_shards = killing
        of_ray, place = [], cluster._ray_place
        cluster._ray_place = lambda: of_ray.append(place()) or of_ray[0]
        outcome = score_windows(plan.reference, windows_of(plan))
        # the actor that lived has added what it published to the index
        place = plan.store.places[0]
        left = place.indexes.covering(place.listed().indexes, place.listed().shards)[1]
        assert len(left) < len(place.listed().shards) / 2, len(left)
        again = make_plan(config)
        assert not len(again.missing), len(again.missing)
        assert not list(Path("data/cache/work").glob("*/job-*"))
        # nothing of Ray is left, no file and no process
        assert of_ray[0] is None or not Path(of_ray[0]).exists()
        assert not [one for one in psutil.Process().children(recursive=True) if one.status() != "zombie"]
        print("RESULT", len(plan.missing), outcome.sequences, len(outcome.quarantined), len(killed))
"""
SMALL = ["--set", "reference.tokens_per_shard=150"]


def ready(where, tiny_model, rows=40):
    where.mkdir(exist_ok=True)
    experiment(where, tiny_model, write_rows(where / "d.jsonl", preference_rows(rows)))


def scores_of(where):
    shards = pl.read_parquet(list(where.glob("data/store/*/scores-*.parquet")))
    assert shards["key"].n_unique() == len(shards)
    return shards.sort("key")


@pytest.mark.engine
@pytest.mark.skipif(
    not EVERYTHING,
    reason="a minute each: make faults; actors start below, and those that die are told of without Ray",
)
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_lost_worker_loses_no_score(tmp_path, tiny_model, all_processors, engine):
    ready(tmp_path, tiny_model)
    ready(tmp_path / "one", tiny_model)
    (tmp_path / "driver.py").write_text(textwrap.dedent(DRIVER))
    chosen = f"reference.engine={engine}"
    done = subprocess.run(
        [sys.executable, "driver.py", chosen],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    missing, sequences, quarantined, killed = map(int, done.stdout.split("RESULT")[1].split()[:4])
    assert (sequences, quarantined, killed) == (missing, 0, 1)
    here = ["precompute", "--config", "experiment.yaml", "--run", "r", *SMALL, "--set", chosen]
    alone = subprocess.run(
        [sys.executable, "-m", "stages.cli", *here],
        cwd=tmp_path / "one",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert alone.returncode == 0
    assert scores_of(tmp_path).equals(scores_of(tmp_path / "one"))


@pytest.mark.parametrize(
    ("gpu", "resources", "settings", "threads"),
    [
        (False, {"CPU": 4}, {"workers": 2}, 2),
        (False, {"CPU": 5}, {"workers": 5}, 1),
        (True, {"CPU": 16, "GPU": 8}, {"workers": 4, "tensor_parallel_size": 2}, 4),
        # a cluster may still grow
        (True, {"CPU": 2}, {"workers": 64, "launcher": "ray"}, 1),
    ],
)
def test_processors_are_shared_out(gpu, resources, settings, threads):
    assert threads_of_each(ReferenceConfig(**settings), resources, gpu=gpu) == threads


@pytest.mark.parametrize(
    ("gpu", "resources", "said"), [(False, {"CPU": 2}, "2 processors"), (True, {"CPU": 64, "GPU": 5}, "5 GPUs")]
)
def test_more_workers_than_there_is_room_for_are_refused(gpu, resources, said):
    with pytest.raises(ConfigError, match=rf"reference\.workers is 3, this machine has {said} for them"):
        threads_of_each(ReferenceConfig(workers=3, tensor_parallel_size=2), resources, gpu=gpu)


def test_without_ray_several_workers_are_refused_with_the_way_out(tmp_path, tiny_model, monkeypatch):
    ready(tmp_path, tiny_model, 4)
    monkeypatch.setitem(sys.modules, "ray", None)
    said = refscore_here(
        tmp_path, "precompute", "--config", "experiment.yaml", "--run", "r", "--set", "reference.workers=2", code=2
    )
    assert "need Ray, which is not installed" in said
    assert "requirements/ray.txt" in said


@pytest.mark.engine
def test_any_responses_are_scored_in_actors_as_they_are_in_one_process(
    tmp_path, tiny_model, all_processors, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ready(tmp_path, tiny_model, 4)
    rows = [{"prompt": row["prompt"], "response": row["chosen"]} for row in preference_rows(20)]
    # one stands twice, and two have no score
    write_rows(tmp_path / "rows.jsonl", [*rows, rows[0], {"prompt": "Hi"}, {"prompt": "Hi", "response": ""}])
    scored, said = {}, {}
    for workers in (1, 2):
        out, here = f"{workers}.parquet", f"reference.store=store-{workers}"
        arguments = ["rows.jsonl", "--config", "experiment.yaml", *SMALL, "--set", here, "--out", out]
        arguments += ["--set", f"reference.workers={workers}"]
        said[workers] = refscore_here(tmp_path, "score", *arguments)
        assert "23 rows: 0 hits, 20 scored, 2 with a problem" in said[workers]
        scored[workers] = pl.read_parquet(tmp_path / out)
    assert "in 2 Ray actors" in said[2]
    without = pl.exclude("logps", "logp")
    assert scored[1].select(without).equals(scored[2].select(without))
    assert scored[1]["logp"].to_list() == pytest.approx(scored[2]["logp"].to_list(), abs=1e-4)
    assert "20 hits, 0 scored, 2 with a problem" in refscore_here(tmp_path, "score", *arguments)
    assert pl.read_parquet(tmp_path / "2.parquet").equals(scored[2])


def actor(job, **wanted):
    reference = ReferenceConfig(model="none", engine="transformers", hangs_after=0.002).model_dump(mode="json")
    wanted = {"job": job.place, "reference_id": "id", "limit": None, "longest": 8, "workers": 2} | wanted
    return cluster.ScoringActor(reference, wanted, ".", 1)


def answer(one):
    (row,) = one(pa.table({"group": ["00000000"]})).to_pylist()
    return json.loads(row["error"])


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    job = Job(str(tmp_path / "job"))
    job.begin("id")
    opened = SimpleNamespace(identity=SimpleNamespace(reference_id="id"), config=ReferenceConfig(hangs_after=0.002))
    monkeypatch.setattr(cluster, "open_reference", lambda _: opened)
    return job


def test_what_a_worker_meets_at_its_start_is_answered_and_not_lost_among_errors_of_ray(job, monkeypatch):
    def fails(*_):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(cluster, "Growing", lambda *_: SimpleNamespace(ready=fails))
    name, message = answer(actor(job))
    assert name == "RefscoreError"
    assert message.startswith(
        "a Ray worker stopped (RuntimeError: no kernel image is available): what was published before"
    )
    assert answer(actor(job, reference_id="other"))[0] == "CheckError"


def test_an_engine_that_hangs_at_its_start_is_noticed(job, monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(cluster, "Growing", lambda *_: SimpleNamespace(ready=lambda _: over.wait(60)))
    try:
        assert "did not start within 0.002 minutes" in answer(actor(job))[1]
    finally:
        over.set()


def test_workers_that_die_at_their_start_are_not_started_for_ever(job, monkeypatch):
    class Died(BaseException):
        """As a signal: nothing below says anything."""

    def dies(*_):
        raise Died

    monkeypatch.setattr(cluster, "Growing", lambda *_: SimpleNamespace(ready=dies))
    for _ in range(5):
        with pytest.raises(Died):
            actor(job)
    # two may be at their start at this moment
    assert "3 workers and more died while they started an engine" in answer(actor(job))[1]
    job.put_new("ready/one.json", {})
    with pytest.raises(Died):
        actor(job)


def test_workers_that_die_over_everything_stop_the_job():
    lost = cluster._Lost()
    for of_group in (2, 2, 1, 2, 2):
        lost.must_be_few(Result(2, 50, dict.fromkeys("ab"[:of_group], "died"), failures=9))
    # not finite is not dead
    lost.must_be_few(Result(2, 50, {"a": "not finite", "b": "not finite"}, failures=0))
    lost.must_be_few(Result(1, 50, {"a": "died"}, failures=2))
    lost.must_be_few(Result(1, 50, {"a": "died"}, failures=2))
    with pytest.raises(RefscoreError, match=r"workers died over every sequence of 3 groups in a row"):
        lost.must_be_few(Result(1, 50, {"a": "died"}, failures=2))


def test_a_disk_that_is_full_while_groups_are_written_stops_the_job_and_nobody_waits(job, monkeypatch):
    def full(*_):
        raise RefscoreError("no space left")

    monkeypatch.setattr(Job, "add", full)
    monkeypatch.setattr(Job, "put_new", full)

    def read():
        with cluster._written(job, iter([MISSING.empty_table()])):
            return list(cluster.names_of_groups(job))

    with pytest.raises(RefscoreError, match="no space left"):
        read()


def test_a_cluster_that_is_not_there_is_said(monkeypatch):
    def refuses(**_):
        raise ConnectionError("Failed to connect to GCS")

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(sys.modules["ray"], "init", refuses)
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS names \(127\.0\.0\.1:1\) cannot be used \(Failed to connect"):  # noqa: SIM117
        with cluster._cluster(ReferenceConfig(launcher="ray")):
            pass


def test_a_job_has_a_place_where_no_working_directory_can_be_made(job, monkeypatch, tmp_path):
    monkeypatch.setattr(cluster.durable, "scratch_place", lambda: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    target = SimpleNamespace(
        reference=SimpleNamespace(config=ReferenceConfig(), identity=SimpleNamespace(reference_id="id"))
    )
    with cluster._job(target) as made:
        assert made.place.startswith(f"{tmp_path}/job-")
