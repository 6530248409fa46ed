"""Processes that share one written plan, one of them killed in the middle: every score once, with the bits of one process."""

from __future__ import annotations

import json
import signal
import time

import polars as pl

from tests.conftest import experiment, preference_rows, refscore_here, write_rows
from tests.faults.conftest import EVERYTHING
from tests.forked import Forked, run

SCORERS, ROWS = (3, 60) if EVERYTHING else (2, 30)
SMALL = ["--config", "experiment.yaml", "--set", "reference.tokens_per_shard=150"]
# the engine takes its time, so that there is a middle
SCORE = """
import sys, time
from pipeline.engines.transformers import TransformersScorer
inner = TransformersScorer.score
def slowly(self, sequences):
    time.sleep(0.2)
    return inner(self, sequences)
TransformersScorer.score = slowly
from stages.cli import main
main()
"""


def ready(where, tiny_model):
    where.mkdir(exist_ok=True)
    experiment(where, tiny_model, write_rows(where / "d.jsonl", preference_rows(ROWS)))
    return where


def start(where, *arguments):
    return Forked(where, SCORE, *arguments, *SMALL)


def wait_for(what, seconds=300):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def scores_of(where):
    rows = pl.read_parquet(list(where.glob("data/store/*/scores-*.parquet")))
    assert rows["key"].n_unique() == len(rows)
    return rows.sort("key")


def test_one_of_them_killed_loses_no_score_and_scores_none_twice(tmp_path, tiny_model, case):
    where, alone = ready(tmp_path / "many", tiny_model), ready(tmp_path / "alone", tiny_model)
    refscore_here(where, "precompute", *SMALL, "--plan-to", "job")
    scorers = [start(where, "score-missing", "job") for _ in range(SCORERS)]
    claims, done = where / "job/claims", where / "job/done"

    def in_the_middle():
        owners = [path for path in claims.iterdir() if f'"pid": {scorers[0].pid}' in path.read_text()]
        return len(owners) > 2 and any((done / path.name.replace(".1.", ".")).exists() for path in owners)

    wait_for(in_the_middle)
    scorers[0].kill()
    said = ["".join(scorer.communicate(timeout=300)) for scorer in scorers]
    assert [scorer.returncode for scorer in scorers] == [-signal.SIGKILL] + [0] * (SCORERS - 1), said
    assert "Traceback" not in "".join(said)
    # what it had in hand was taken over
    assert list(claims.glob("*.2.json"))
    groups = {path.stem for path in (where / "job/missing").iterdir()}
    assert {path.stem for path in done.iterdir()} == groups
    refscore_here(alone, "precompute", *SMALL, "--run", "r")
    assert scores_of(where).equals(scores_of(alone))
    assert f"{2 * ROWS} hits, 0 misses" in refscore_here(where, "precompute", *SMALL, "--run", "r")
    case(f"one of {SCORERS} processes killed that score one plan")


def test_one_that_is_interrupted_gives_up_what_it_has_and_the_next_takes_it_at_once(tmp_path, tiny_model, case):
    where = ready(tmp_path / "many", tiny_model)
    refscore_here(where, "precompute", *SMALL, "--plan-to", "job")
    scorer = start(where, "score-missing", "job")
    wait_for(lambda: len(list((where / "job/done").iterdir())) > 1)
    scorer.send_signal(signal.SIGTERM)
    said = "".join(scorer.communicate(timeout=120))
    assert scorer.returncode == 1, said
    assert "the same command goes on from there" in said
    states = [path.read_text() for path in (where / "job/claims").iterdir()]
    assert any('"given up"' in text for text in states)
    refscore_here(where, "score-missing", "job", *SMALL)
    assert len(scores_of(where)) == 2 * ROWS
    # nothing was wrong with what it gave up: it is scored whole, not prompt by prompt
    assert not any('"failures": 1' in path.read_text() for path in (where / "job/done").iterdir())
    case("a process that scores a written plan is stopped by SIGTERM")


POISONED = """
import json, os, signal, sys
from pipeline.engines.transformers import TransformersScorer
poison, inner = json.loads(sys.argv.pop(1)), TransformersScorer.score
def deadly(self, sequences):
    if any(list(one.prompt_ids) == poison for one in sequences):
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(self, sequences)
TransformersScorer.score = deadly
from stages.cli import main
main()
"""


def test_a_prompt_that_kills_its_process_twice_is_left_out_and_the_job_goes_on(tmp_path, tiny_model, case):
    where = ready(tmp_path / "many", tiny_model)
    refscore_here(where, "precompute", *SMALL, "--plan-to", "job")
    rows = pl.read_parquet(where / "job/missing/00000003.parquet")
    poison = rows["prompt_ids"][0].to_list()
    codes, said = [], ""
    while 0 not in codes:
        assert len(codes) < 5
        done = run(where, POISONED, json.dumps(poison), "score-missing", "job", *SMALL)
        codes.append(done.returncode)
        said = done.stdout
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert f"2 sequences of {2 * ROWS} are not stored" in said
    assert said.count("while it scored this prompt, 2 times") == 2
    assert len(scores_of(where)) == 2 * ROWS - 2
    case("a prompt that kills the process that scores it")
