"""Two actors of a local Ray, one killed in the middle: everything is scored, with the bits of one process; and what stops them."""

import os
import subprocess
import sys
import textwrap

import polars as pl
import pytest

from pipeline.config.experiment import ReferenceConfig
from pipeline.errors import ConfigError
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
        outcome = score_windows(plan.reference, windows_of(plan))
        # the actor that lived has added what it published to the index
        place = plan.store.places[0]
        left = place.indexes.covering(place.listed().indexes, place.listed().shards)[1]
        assert len(left) < len(place.listed().shards) / 2, len(left)
        again = make_plan(config)
        assert not len(again.missing), len(again.missing)
        assert not list(Path("data/cache/work").glob("*/job-*"))
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
    reason="a minute each: make faults; two actors are in stages/test_quarantine, claims that are taken over in test_many",
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
