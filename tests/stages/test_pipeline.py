"""All three stages on a tiny model with real vLLM: artifacts, reuse, and what each stage says."""

import html
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.artifacts import schemas, tables
from pipeline.report import addresses
from tests.conftest import ROOT, must_leave_nothing_outside, refscore_here
from tests.forked import COMMAND, MODULE
from tests.forked import run as run_forked

pytestmark = pytest.mark.engine

ARTIFACTS = {
    "pairs.parquet": schemas.PAIRS,
    "dropped.parquet": schemas.DROPPED,
    "metrics.parquet": schemas.METRICS,
    "policy_logps.parquet": schemas.POLICY_LOGPS,
    "samples.parquet": schemas.SAMPLES,
    "judgements.parquet": schemas.JUDGEMENTS,
}


@pytest.fixture
def run(pipeline_run):
    return pipeline_run[0] / "data" / "runs" / "first"


def set_up(pipeline_run, tmp_path):
    """A copy of the directory, to change things in."""
    return shutil.copytree(pipeline_run[0], tmp_path / "copy")


@pytest.mark.parametrize("name", ARTIFACTS)
def test_every_table_has_its_columns_and_polars_reads_it(run, name):
    assert pq.read_schema(run / name).remove_metadata().equals(ARTIFACTS[name])
    assert len(pl.read_parquet(run / name)) > 0


def test_the_other_artifacts_are_there(run):
    for name in ("config.yaml", "provenance.json", "gate.json", "eval.json", "report.html", "model/model.safetensors"):
        assert (run / name).stat().st_size > 0
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000004"]
    assert list((run / "tensorboard").glob("events.*"))
    provenance = json.loads((run / "provenance.json").read_text())
    assert len(provenance["reference_id"]) == 64
    assert provenance["stages"].keys() == {"precompute", "train", "eval"}


def test_no_pickle_is_written(run):
    assert not [path for path in run.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]


def test_vllm_scores_equal_a_plain_transformers_forward(run, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    for row in pl.read_parquet(run / "pairs.parquet").iter_rows(named=True):
        for side in ("chosen", "rejected"):
            ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
            with torch.no_grad():
                logits = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1]
            plain = -torch.nn.functional.cross_entropy(
                logits, torch.tensor(row[f"{side}_ids"]), reduction="none"
            ).numpy()
            stored = np.array(row[f"ref_{side}_token_logps"], dtype=np.float32)
            assert np.abs(stored - plain).max() < 1e-4
            assert abs(stored.astype(np.float64).sum() - row[f"ref_{side}_logps"]) < 1e-9


def test_what_was_dropped_is_said_and_kept(pipeline_run, run):
    assert "dropped   1 x empty_response" in pipeline_run[1]["precompute"]
    assert pl.read_parquet(run / "dropped.parquet").row(0, named=True)["reason"] == "empty_response"


def test_the_gate_passed_with_figures_near_nothing(run):
    gate = json.loads((run / "gate.json").read_text())
    assert gate["passed"]
    assert gate["numerics"] == "float32"
    assert gate["mean_absolute_difference"] < 1e-4


def test_training_moved_the_model(run):
    metrics = pl.read_parquet(run / "metrics.parquet")
    assert metrics["step"].to_list() == [0, 1, 2, 3, 4]
    assert metrics["eval_loss"][0] == pytest.approx(np.log(2), abs=1e-4)
    assert metrics["eval_loss"][-1] < metrics["eval_loss"][0]


def test_the_saved_model_loads_and_is_not_the_reference(run, tiny_model):
    saved = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    base = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    assert any(not torch.equal(saved[name], base[name]) for name in base)
    assert (
        AutoTokenizer.from_pretrained(run / "model").chat_template
        == AutoTokenizer.from_pretrained(tiny_model).chat_template
    )
    card = (run / "model" / "README.md").read_text()
    assert "eval\\_rewards/accuracies" in card
    assert "More information needed" not in card


def test_nothing_is_written_outside(pipeline_run):
    must_leave_nothing_outside(*pipeline_run)


def test_transformers_and_vllm_load_the_saved_model_and_agree_with_the_trainer(pipeline_run):
    done = run_forked(pipeline_run[0], MODULE, "tests.stages.saved_model", "data/runs/first", "4")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.split("RESULT ")[1])
    assert found["sequences"] == 8
    assert found["transformers"] < 1e-4
    assert found["vllm"] < 1e-4


def test_an_evaluation_as_json(pipeline_run):
    """Samples and KL are those of the run that was: no engine starts."""
    where, _ = pipeline_run
    config = where / "experiment.yaml"
    done = run_forked(where, COMMAND, "eval", "--config", config, "--run", "first", "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert "samples   policy: " in done.stderr
    written = json.loads((where / "data/runs/first/eval.json").read_text())
    assert {name: results[name] for name in written} == written
    assert results["run"] == "first"
    assert (where / results["report"]).is_file()


def test_the_report_comes_last_and_holds_the_verdict(pipeline_run, run):
    assert re.search(r"report +data/runs/first/report.html$", pipeline_run[1]["eval"].strip())
    page = (run / "report.html").read_text()
    # names lead to their rows, and what belongs together does not break
    text = re.sub("[\u2060\u200b]", "", html.unescape(re.sub("<[^>]*>", "", page))).replace("\xa0", " ")
    assert json.loads((run / "eval.json").read_text())["verdict"] in text
    places = set(re.findall("https?://[^/]*", page))
    # of a picture's format, and of links to the pages of this machine's own server
    assert places <= {"http://www.w3.org", "http://purl.org", "http://creativecommons.org", addresses.PLACE}


def test_the_notebook_of_the_pages_runs_in_one_process(pipeline_run, tmp_path, tiny_model):
    """docs/python.md, every block of it; what it asks for is stored, so no engine of vLLM starts."""
    where = set_up(pipeline_run, tmp_path)
    (where / "rows.jsonl").write_text('{"prompt": "How do I cook rice?", "response": "Boil it."}\n')
    page = (ROOT / "docs" / "python.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    for shown, here in (
        ('load_config("demo", ["train.beta=0.1"])', 'load_config("experiment.yaml")'),
        ('load_config("demo")', 'load_config("experiment.yaml", ["reference.engine=transformers"])'),
        ("data/models/smollm2-135m-instruct", str(tiny_model)),
        ("[1, 9690, 198], [28120, 2], [5345, 2]", "[1, 2, 3], [4, 5], [6, 5]"),
    ):
        assert shown in code
        code = code.replace(shown, here)
    done = run_forked(where, code)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("0 of 48 sequences are not in the store")
    assert json.loads((where / "data/runs/notebook/eval.json").read_text())["verdict"] in done.stdout


def test_the_pages_polars_snippets_run_one_after_the_other(pipeline_run):
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "artifacts.md").read_text(), re.DOTALL)
    code = "\n".join(snippets).replace("data/runs/demo", "data/runs/first")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=pipeline_run[0], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("shape:") == len(re.findall(r"^print\(", "\n".join(snippets), re.MULTILINE)) >= 4


def test_a_second_precompute_scores_nothing_and_starts_no_engine(pipeline_run, tmp_path):
    where = set_up(pipeline_run, tmp_path)
    said = refscore_here(where, "precompute", "--config", "experiment.yaml", "--run", "first")
    assert "nothing to score" in said
    assert "starting" not in said


@pytest.mark.parametrize(
    "change",
    [
        "train.beta=0.5",
        "train.learning_rate=1e-4",
        "train.seed=7",
        "train.per_device_train_batch_size=3",
        "data.eval_fraction=0.5",
    ],
)
def test_training_settings_and_splits_score_nothing(pipeline_run, tmp_path, change):
    said = refscore_here(pipeline_run[0], "precompute", "--plan", "--config", "experiment.yaml", "--set", change)
    assert " 0 misses" in said


@pytest.mark.parametrize("change", ["reference.dtype=bfloat16", "reference.engine=transformers", "data.max_length=60"])
def test_numerics_and_other_tokens_are_misses(pipeline_run, change):
    said = refscore_here(
        pipeline_run[0],
        "precompute",
        "--plan",
        "--config",
        "experiment.yaml",
        "--set",
        change,
        "--set",
        "data.too_long=truncate_response",
    )
    assert " 0 misses" not in said


def test_a_sweep_needs_no_precompute(pipeline_run, tmp_path):
    where = set_up(pipeline_run, tmp_path)
    said = refscore_here(where, "train", "--config", "experiment.yaml", "--run", "beta05", "--set", "train.beta=0.5")
    assert " 0 misses" in said
    assert "starting" not in said
    assert (where / "data/runs/beta05/model/model.safetensors").exists()
    table = refscore_here(where, "compare", "first", "beta05")
    assert re.search(r"train\.beta +0\.1 +0\.5", table)


def test_a_finished_training_is_not_repeated_and_another_one_is_not_mixed_in(pipeline_run, tmp_path):
    where = set_up(pipeline_run, tmp_path)
    options = ("--config", "experiment.yaml", "--run", "first")
    assert "nothing to train" in refscore_here(where, "train", *options)
    said = refscore_here(where, "train", *options, "--set", "train.beta=0.5", code=2)
    assert "train.beta: 0.1 -> 0.5" in said
    assert "--restart" in said


def test_samples_made_before_are_used_again(pipeline_run, tmp_path):
    where = set_up(pipeline_run, tmp_path)
    said = refscore_here(where, "eval", "--config", "experiment.yaml", "--run", "first")
    assert said.count("made before under the same settings") == 2


def test_show_prints_every_artifact(pipeline_run, run):
    for path in [
        run,
        run / "pairs.parquet",
        run / "eval.json",
        run / "config.yaml",
        *run.parent.parent.glob("store/*/*.parquet"),
    ]:
        assert refscore_here(pipeline_run[0], "show", path).strip()
    assert "ref_chosen_token_logps (length)" in refscore_here(pipeline_run[0], "show", run / "pairs.parquet")


def test_the_store_is_listed_and_verified(pipeline_run, tmp_path):
    where = set_up(pipeline_run, tmp_path)
    assert "first" in refscore_here(where, "store", "ls")
    assert "0 damaged" in refscore_here(where, "store", "verify")
    # a small one first, so that scores are there soon
    small, large = sorted(where.glob("data/store/*/scores-*.parquet"), key=lambda path: pl.read_parquet(path).height)
    assert pl.read_parquet(small).height < pl.read_parquet(large).height / 2
    large.write_bytes(large.read_bytes()[:-1])
    assert "1 damaged" in refscore_here(where, "store", "verify", code=4)
    # what was set aside is a miss, and training says what to do
    (where / "data/runs/first/pairs.parquet").unlink()
    said = refscore_here(where, "train", "--config", "experiment.yaml", "--run", "first", code=2)
    assert "run 'refscore precompute'" in said


def test_verify_scores_again_and_finds_a_wrong_reference(pipeline_run, tmp_path):
    where = set_up(pipeline_run, tmp_path)
    assert "passed" in refscore_here(where, "verify", "--run", "first")
    shift_reference(where / "data/runs/first/pairs.parquet", 0.5)
    assert "differ by 0.5" in refscore_here(where, "verify", "--run", "first", code=4)


def test_the_gate_closes_on_a_wrong_reference(pipeline_run, tmp_path):
    where = set_up(pipeline_run, tmp_path)
    shift_reference(where / "data/runs/first/pairs.parquet", 0.5)
    said = refscore_here(where, "train", "--config", "experiment.yaml", "--run", "first", "--restart", code=4)
    assert "the gate is closed" in said
    assert not json.loads((where / "data/runs/first/gate.json").read_text())["passed"]


def test_the_stored_reference_is_what_the_loss_uses(pipeline_run, tmp_path):
    """A shift within the gate's tolerance must still move the loss."""
    where = set_up(pipeline_run, tmp_path)
    before = pl.read_parquet(where / "data/runs/first/metrics.parquet")["loss"][1]
    shift_reference(where / "data/runs/first/pairs.parquet", 0.0005, sides=("chosen",))
    refscore_here(where, "train", "--config", "experiment.yaml", "--run", "first", "--restart")
    after = pl.read_parquet(where / "data/runs/first/metrics.parquet")["loss"][1]
    assert abs(after - before) > 1e-4


def shift_reference(path, amount, sides=("chosen", "rejected")):
    """Lower stored logps by `amount` nats a token, sums included."""
    table = pq.read_table(path)
    frame = pl.from_arrow(table)
    for side in sides:
        moved = frame[f"ref_{side}_token_logps"].list.eval(pl.element() - amount)
        frame = frame.with_columns(moved.alias(f"ref_{side}_token_logps"))
        sums = [float(np.asarray(row, dtype=np.float32).sum(dtype=np.float64)) for row in moved.to_list()]
        frame = frame.with_columns(pl.Series(f"ref_{side}_logps", sums))
    tables.write_table(path, frame.to_arrow().cast(schemas.PAIRS).replace_schema_metadata(table.schema.metadata))
