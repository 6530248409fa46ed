"""One sequence without a finite score is left out by name; the job goes on, and its exit code says so."""

import math
import os
import re

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.engines.protocol import Request
from pipeline.engines.quarantine import score_each
from pipeline.errors import CheckError
from tests import forked
from tests.conftest import experiment, make_tiny_model, preference_rows, refscore, refscore_here, write_rows

ROWS = 10


@pytest.fixture
def model(tmp_path):
    """A model that gives NaN from the token that begins `Zyx` on."""
    from pipeline.config.training import PolicyConfig
    from pipeline.models.load import load_tokenizer

    directory = make_tiny_model(tmp_path / "model", tie_word_embeddings=False)
    (bad,) = load_tokenizer(directory, PolicyConfig(model=str(directory))).convert_tokens_to_ids(["Z"])
    tensors = load_file(directory / "model.safetensors")
    tensors["model.embed_tokens.weight"][bad] = math.nan
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture
def config(tmp_path, model):
    rows = preference_rows(ROWS)
    rows[3]["rejected"] = "The Zebra sat."
    rows[6]["chosen"] = "Boil Zwo eggs."
    data = write_rows(tmp_path / "preferences.jsonl", rows)
    train = {"max_steps": 2}
    config = experiment(tmp_path, model, data, train=train)
    config.write_text(config.read_text().replace("eval_fraction: 0.25", "eval_fraction: 0.0"))
    return config


def check(where, said):
    assert "2 sequences have no finite score" in said
    directory = where / "data/runs/one"
    pairs, dropped = (pl.read_parquet(directory / f"{name}.parquet") for name in ("pairs", "dropped"))
    assert sorted(pairs["source_row"]) == [row for row in range(ROWS) if row not in (3, 6)]
    assert len(pairs) + len(dropped) == ROWS
    left_out = {row["source_row"]: row for row in dropped.iter_rows(named=True)}
    assert {row["reason"] for row in left_out.values()} == {"not_finite"}
    assert left_out[3]["detail"].startswith("rejected: value ")
    assert left_out[6]["detail"].startswith("chosen: value ")
    assert all(
        len(row["prompt_ids"]) and len(row["chosen_ids"]) and len(row["rejected_ids"]) for row in left_out.values()
    )
    assert pairs["ref_chosen_logps"].is_finite().all()


def test_the_job_goes_on_and_the_exit_code_says_so(tmp_path, config):
    arguments = ["precompute", "--config", config, "--run", "one"]
    check(tmp_path, refscore_here(tmp_path, *arguments, code=4))
    # nothing is lost, nothing is scored twice but what has no score
    said = refscore_here(tmp_path, *arguments, code=4)
    assert "18 hits, 2 misses" in said
    check(tmp_path, said)
    assert "held-out" not in refscore_here(tmp_path, "train", "--config", config, "--run", "one")
    assert "run one dropped the row as not_finite" in refscore_here(
        tmp_path, "store", "explain", "--config", config, "--row", 3
    )


def test_processes_that_claim_say_which_and_the_joining_run_says_it_too(tmp_path, config):
    refscore_here(tmp_path, "precompute", "--config", config, "--run", "one", "--plan-to", "job")
    said = refscore_here(tmp_path, "score-missing", "job", "--config", config)
    assert len(re.findall(r"^left out  [0-9a-f]{12} \.\.\.: value \d+ of \d+ is not finite$", said, re.MULTILINE)) == 2
    assert "2 sequences of 20 are not stored" in said
    said = refscore_here(tmp_path, "precompute", "--config", config, "--run", "one", code=4)
    assert "18 hits, 2 misses" in said
    check(tmp_path, said)


@pytest.mark.skipif(
    not os.environ.get("REFSCORE_FAULTS"),
    reason="Ray is started once in precompute/test_ray: make faults; processes that claim share the job",
)
def test_workers_say_it_too(tmp_path, config, all_processors):
    check(
        tmp_path,
        refscore(tmp_path, "precompute", "--config", config, "--run", "one", "--set", "reference.workers=2", code=4),
    )


@pytest.mark.engine
def test_vllm_says_it_too(tmp_path, config):
    check(
        tmp_path,
        forked.refscore(
            tmp_path, "precompute", "--config", config, "--run", "one", "--set", "reference.engine=vllm", code=4
        ),
    )


def test_scoring_rows_says_which(tmp_path, config):
    rows = [{"prompt": "a", "response": text} for text in ("Rice.", "Zoo.", "Salt.")]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    said = refscore_here(tmp_path, "score", data, "--out", tmp_path / "s.parquet", "--config", config, code=4)
    assert "1 sequences have no finite score" in said
    scores = pl.read_parquet(tmp_path / "s.parquet")
    assert scores["problem"].is_null().to_list() == [True, False, True]
    assert scores["problem"][1].startswith("not_finite value 0 of")
    assert scores["logp"].is_null().to_list() == [False, True, False]


class Fake:
    """Scores that one bad sequence spoils for its whole batch."""

    def __init__(self, bad):
        self.bad, self.asked = bad, []

    def score(self, sequences):
        self.asked.append(len(sequences))
        spoiled = any(one.response_ids[0] in self.bad for one in sequences)
        return [torch.full((len(one.response_ids),), -math.inf if spoiled else -1.0).numpy() for one in sequences]


def test_a_sequence_that_is_spoiled_by_another_is_scored_alone():
    requests = [Request([1], [number, 2]) for number in range(4)]
    scores = score_each(Fake({2}), requests)
    assert [bool((one == -1).all()) for one in scores] == [True, True, False, True]


def test_a_model_without_any_finite_score_stops_at_once():
    requests = [Request([1], [number, 2]) for number in range(12)]
    fake = Fake(set(range(12)))
    with pytest.raises(CheckError, match="none of 12 sequences"):
        score_each(fake, requests)
    assert fake.asked == [12]
