"""A tiny policy whose samples a double writes, and what `refscore rollout` makes of them."""

import json

import polars as pl
import pytest

from pipeline.artifacts.tables import read_about
from pipeline.engines.transformers import TransformersScorer
from tests.conftest import experiment, preference_rows, refscore_here, write_rows
from tests.engines.sampling import sample_here

SETTINGS = {"samples": 3, "prompts_per_shard": 4}


class Place:
    """A directory with a configuration; `told` says what sampling engines were started, `scored` what scorers were given."""

    def __init__(self, where, config, monkeypatch):
        self.where, self.config = where, config
        self.told, self.scored = [], []
        sample_here(monkeypatch, self.told)
        inner = TransformersScorer.score

        def score(scorer, sequences):
            self.scored.append(list(sequences))
            return inner(scorer, sequences)

        monkeypatch.setattr(TransformersScorer, "score", score)

    def rollout(self, *settings, run="r", code=0):
        """What the command says; `told` and `scored` are of this call alone."""
        self.told.clear()
        self.scored.clear()
        sets = [part for setting in settings for part in ("--set", setting)]
        return refscore_here(self.where, "rollout", "--config", self.config, "--run", run, *sets, code=code)

    def run(self, name="r"):
        return self.where / "data/runs" / name

    def rows(self, run="r"):
        return pl.read_parquet(self.run(run) / "rollouts.parquet")

    def about(self, run="r"):
        return read_about(self.run(run) / "rollouts.parquet")

    def provenance(self, run="r"):
        return json.loads((self.run(run) / "provenance.json").read_text())["stages"]["rollout"]


@pytest.fixture
def place(tmp_path, tiny_model, monkeypatch):
    data = write_rows(tmp_path / "preferences.jsonl", preference_rows(14))
    judge = ["implicit", "rule:contains=dog", "rule:no_repetition"]
    config = experiment(tmp_path, tiny_model, data, rollout=SETTINGS, generate={"max_tokens": 12}, judge=judge)
    return Place(tmp_path, config, monkeypatch)
