"""`refscore rollout` on prompts alone and on labelled responses: what it samples, what stage three then finds, what others say."""

import polars as pl
import pytest

from pipeline.artifacts.runs import Run
from pipeline.artifacts.schemas import RESPONSES
from pipeline.artifacts.tables import read_about, read_table
from pipeline.config.files import load_config
from pipeline.evaluation.samples import held_out_prompts
from pipeline.pairs.splits import prompt_id_of
from pipeline.precompute.pairs_file import ensure_pairs, is_current, table_of
from pipeline.rollouts.current import ensure_rollouts
from tests.conftest import preference_rows, refscore_here, write_rows

ON_SAMPLES = "train.objective=policy_gradient"
PROMPTS = [{"prompt": row["prompt"]} for row in preference_rows(14)]
LABELLED = [
    {"prompt": row["prompt"], "completion": text, "label": good}
    for row in preference_rows(14)
    for text, good in ((row["chosen"], True), (row["rejected"], False))
]


def of_data(place, rows):
    write_rows(place.where / "preferences.jsonl", rows)
    return place


@pytest.fixture
def of_pairs(place):
    """The prompts of the pairs, as they are sampled and held out."""
    place.rollout(ON_SAMPLES, run="pairs")
    return place


def test_prompts_alone_and_labelled_responses_give_what_the_pairs_of_the_same_prompts_give(of_pairs):
    rows, held_out = of_pairs.rows("pairs"), held_out_prompts(of_pairs.run("pairs") / "pairs.parquet", None)
    for kind, data in {"prompts": PROMPTS, "labelled": LABELLED}.items():
        said = of_data(of_pairs, data).rollout(ON_SAMPLES, run=kind)
        assert of_pairs.rows(kind).equals(rows)
        # samples do not depend on what stands beside a prompt
        assert (of_pairs.told, of_pairs.scored) == ([], [])
        assert "12 of the training split, 3 samples each" in said
        assert f"rows      {len(data)} read, 14 prompts: 12 train, 2 eval" in said
        run = Run(of_pairs.run(kind))
        assert (run.scored, run.pairs.exists()) == (run.responses, False)
        assert held_out_prompts(run.scored, None) == held_out
        table = read_table(run.responses, RESPONSES).to_pylist()
        assert {row["kind"] for row in table} == {"prompt"}
        empty = ("response", "label", "score", "response_ids", "ref_response_token_logps", "ref_response_logps")
        assert all(row[name] is None for row in table for name in empty)
        assert (read_about(run.responses)["data"], read_about(run.responses)["scored"]) == ("prompts", False)
    dropped = pl.read_parquet(of_pairs.run("labelled") / "dropped.parquet")
    assert dropped["reason"].to_list() == ["duplicate"] * 14
    assert dropped["detail"][0].startswith("prompt ")


def test_pairs_beside_prompts_are_prompts(place):
    write_rows(place.where / "more.jsonl", [{"messages": [{"role": "user", "content": "Anything else?"}]}])
    place.rollout(ON_SAMPLES, f"data.path=[preferences.jsonl, {place.where / 'more.jsonl'}]", "data.eval_fraction=0")
    assert place.rows()["prompt_id"].n_unique() == 15
    assert "Anything else?" in place.rows()["prompt"].to_list()
    assert place.run().joinpath("responses.parquet").exists()


def test_what_is_there_is_current_until_the_data_changes(place, monkeypatch):
    monkeypatch.chdir(place.where)
    of_data(place, PROMPTS).rollout(ON_SAMPLES)
    run, config = Run(place.run()), load_config(place.config, [ON_SAMPLES])
    assert table_of(run, config) == run.responses
    assert is_current(run.responses, config, scored=False)
    before = run.responses.stat().st_mtime_ns
    ensure_pairs(config, run)
    ensure_rollouts(config, run)
    assert run.responses.stat().st_mtime_ns == before
    # of a labelled loss it is no table
    assert not is_current(run.responses, load_config(place.config, ["train.loss_type=bco"]), scored=False)
    of_data(place, preference_rows(14))
    assert not is_current(run.responses, config, scored=False)
    ensure_pairs(config, run)
    assert (run.scored, run.responses.exists(), is_current(run.pairs, config, scored=False)) == (run.pairs, False, True)


def test_stage_three_takes_held_out_prompts_and_leaves_the_implicit_judge_out(place):
    of_data(place, PROMPTS)
    sets = [part for setting in (ON_SAMPLES, "train.max_steps=1") for part in ("--set", setting)]
    _, _, said = (
        refscore_here(place.where, stage, "--config", place.config, "--run", "r", *sets)
        for stage in ("rollout", "train", "eval")
    )
    assert "judge     implicit is left out: it compares held-out pairs, and responses.parquet holds none" in said
    assert "prompts   2 held out" in said
    samples = pl.read_parquet(place.run() / "samples.parquet")
    held_out = {prompt.prompt_id for prompt in held_out_prompts(place.run() / "responses.parquet", None)}
    assert set(samples["prompt_id"]) == held_out
    train = {prompt_id_of(ids) for ids in place.rows()["prompt_ids"]}
    assert not held_out & train


@pytest.mark.parametrize(
    "settings", [(), ("train.objective=reward",), ("train.loss_type=kto",), ("train.loss_type=plackett_luce",)]
)
@pytest.mark.parametrize("stage", ["precompute", "train", "plan"])
def test_other_trainings_say_what_learns_from_prompts(place, stage, settings):
    of_data(place, PROMPTS)
    sets = [part for setting in settings for part in ("--set", setting)]
    run = [] if stage == "plan" else ["--run", "r"]
    said = refscore_here(place.where, stage, "--config", place.config, *run, *sets, code=3)
    assert "the file holds prompts and no responses" in said
    assert "train.objective=policy_gradient learns from samples, which 'refscore rollout' makes of prompts" in said


def test_nothing_left_to_sample_is_said(place):
    said = of_data(place, [{"prompt": "  "}, {"prompt": ""}]).rollout(ON_SAMPLES, code=3)
    assert "no prompt is left to train on" in said
    assert "2 x empty_prompt" in said


def test_validate_says_what_they_are(place, tiny_model):
    of_data(place, [*PROMPTS, {"prompt": " "}])
    said = refscore_here(place.where, "validate", "preferences.jsonl")
    assert "preferences.jsonl: prompts, TRL explicit, strings" in said
    assert "15 rows, 14 usable, 1 dropped" in said
    assert "train.objective=policy_gradient makes samples" in said
    said = refscore_here(place.where, "validate", "preferences.jsonl", "--model", tiny_model)
    assert "15 rows, 14 usable, 1 dropped" in said
    assert "prompt" in said
    assert "response" not in said
    # for the sake of their prompts
    write_rows(place.where / "preferences.jsonl", [{"prompt": "Hi?", "completion": "Hello."}])
    refscore_here(place.where, "validate", "preferences.jsonl", code=3)
    said = refscore_here(place.where, "validate", "preferences.jsonl", "--set", ON_SAMPLES)
    assert "1 rows, 1 usable" in said
    assert "nothing reads the column completion" in said


def test_init_says_what_to_do_instead(place, tiny_model):
    of_data(place, PROMPTS)
    said = refscore_here(place.where, "init", "preferences.jsonl", "--model", tiny_model, code=3)
    assert "holds prompts and no responses" in said
    assert "'refscore rollout'" in said
    assert not (place.where / "preferences.yaml").exists()


def test_what_looks_at_a_run_takes_it_for_one_without_scores(place):
    of_data(place, PROMPTS).rollout(ON_SAMPLES)
    assert "holds no reference scores" in refscore_here(place.where, "verify", "--run", "r", code=3)
    assert "prompts" in refscore_here(place.where, "show", place.run() / "responses.parquet")
    assert "rollouts" in refscore_here(place.where, "list")


@pytest.mark.parametrize("rows", [preference_rows(14), PROMPTS], ids=["pairs", "prompts"])
def test_precompute_writes_what_stage_three_reads_and_says_what_comes_next(place, rows):
    of_data(place, rows)
    table = place.run() / ("responses.parquet" if rows is PROMPTS else "pairs.parquet")
    for more in (["--plan"], []):
        assert not table.exists()
        said = refscore_here(
            place.where, "precompute", "--config", place.config, "--run", "r", "--set", ON_SAMPLES, *more
        )
        assert "nothing to score: the training learns from samples, which 'refscore rollout' makes and scores" in said
        assert "held-out prompts, without scores, for 'refscore eval'" in said
        assert "next      'refscore rollout' with the same configuration and run" in said
    assert read_about(table)["scored"] is False
    assert place.scored == []
    said = refscore_here(
        place.where,
        "precompute",
        "--config",
        place.config,
        "--run",
        "s",
        "--set",
        "train.loss_type=simpo",
        code=3 * (rows is PROMPTS),
    )
    assert "refscore rollout' with" not in said
