"""`refscore rollout` whose samples are scored in actors of Ray: the rows of one process."""

import polars as pl
import pytest

from pipeline.precompute.launch import Outcome
from pipeline.rollouts import scores
from tests.conftest import ROOT

pytest.importorskip("ray", reason="Ray is an optional dependency: the extra 'ray'")


@pytest.mark.engine
def test_samples_are_scored_in_actors_as_they_are_in_one_process(place, all_processors, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    place.rollout()
    assert place.scored
    said = place.rollout("reference.workers=2", "reference.store=another", run="many")
    assert "in 2 Ray actors" in said
    # by nobody here
    assert not place.scored
    one, many = place.rows(), place.rows("many")
    without = pl.exclude("logps", "ref_logps", "logp", "ref_logp")
    assert one.select(without).equals(many.select(without))
    for name in ("logp", "ref_logp"):
        assert one[name].to_list() == pytest.approx(many[name].to_list(), abs=1e-4)
    assert "no engine is started" in place.rollout("reference.workers=2", "reference.store=another", run="more")


def test_samples_that_were_all_adopted_are_no_reason_to_stop(place, monkeypatch):
    """Nothing is scored then, so that there is no time to share out by it."""
    place.rollout()
    (table,) = [place.rows()]
    made = []

    def adopts(model, windows, listener):
        made.extend(window.missing for window in windows)
        return Outcome(adopted=sum(map(len, made)))

    monkeypatch.setattr(scores, "score_windows", adopts)
    # what was not published is missed after it
    said = place.rollout("reference.workers=2", "reference.store=another", run="many", code=4)
    assert "scores are missing from the store after scoring" in said
    assert sum(map(len, made)) <= len(table)
