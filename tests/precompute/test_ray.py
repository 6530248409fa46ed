"""A local Ray cluster of two workers, one killed in the middle: everything is scored, with the bits of one process."""

import os
import subprocess
import sys
import textwrap

import polars as pl
import pytest

from tests.conftest import ROOT, experiment, preference_rows, refscore_here, write_rows

pytest.importorskip("ray", reason="Ray is an optional dependency: the extra 'ray'")

DRIVER = """
    from pathlib import Path

    import psutil
    import ray
    from pipeline.precompute import ray as ray_launcher
    from pipeline.config.files import load_config
    from pipeline.precompute.join import write_joined
    from pipeline.precompute.plan import make_plan

    if __name__ == "__main__":
        # workers have the environment of this process: with one of their own those that Ray has ready would stand idle
        ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
        config = load_config("experiment.yaml", ["reference.workers=2", "reference.launcher=ray",
                                                 "reference.tokens_per_shard=150"])
        plan = make_plan(config)
        shards, killed = [], []

        def on_shard(sequences, tokens):
            shards.append(sequences)
            if not killed:
                mine = psutil.Process().children(recursive=True)
                workers = [one for one in mine if "ScoringActor" in " ".join(one.cmdline())]
                assert len(workers) == 2, [one.cmdline() for one in mine]
                killed.append(workers[0].pid)
                workers[0].kill()

        ray_launcher.score_missing(plan, on_shard)
        again = make_plan(config)
        assert not len(again.missing), len(again.missing)
        write_joined(Path("ray.parquet"), again, {})
        print("RESULT", len(plan.missing), sum(shards), len(shards), len(killed))
"""


@pytest.mark.engine
def test_a_lost_worker_loses_no_row(tmp_path, tiny_model):
    data = write_rows(tmp_path / "d.jsonl", preference_rows(40))
    one = tmp_path / "one"
    one.mkdir()
    experiment(one, tiny_model, data)
    experiment(tmp_path, tiny_model, data)
    (tmp_path / "driver.py").write_text(textwrap.dedent(DRIVER))
    done = subprocess.run(
        [sys.executable, "driver.py"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    missing, rows, shards, killed = map(int, done.stdout.split("RESULT")[1].split()[:4])
    assert rows == missing
    assert shards > 4
    assert killed == 1
    refscore_here(
        one, "precompute", "--config", "experiment.yaml", "--run", "r", "--set", "reference.tokens_per_shard=150"
    )
    alone = pl.read_parquet(one / "data/runs/r/pairs.parquet")
    ray = pl.read_parquet(tmp_path / "ray.parquet")
    assert ray["pair_id"].n_unique() == len(ray) == len(alone)
    assert ray.equals(alone)
