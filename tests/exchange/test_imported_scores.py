"""Scores that others computed: read in every form, kept under a name of their own, used where they are asked for, checked."""

import json
import os
import shutil

import polars as pl
import pyarrow as pa
import pytest
import torch

from pipeline.artifacts.runs import open_run
from pipeline.artifacts.schemas import PAIRS
from pipeline.artifacts.tables import read_about, read_table, write_table
from pipeline.errors import DataError
from pipeline.training.inputs.pairs import load_pairs
from tests.conftest import experiment, make_tiny_model, preference_rows, refscore_here, write_rows
from tests.exchange.conftest import exported

FORMS = ("trl", "jsonl", "open_instruct", "fairseq2")
BY = ["--set", "reference.engine=imported", "--set", "reference.imported_by=Lab A"]
SUMS = ["ref_chosen_logps", "ref_rejected_logps"]
VALUES = ["ref_chosen_token_logps", "ref_rejected_token_logps"]


@pytest.fixture(scope="module")
def forms(scored, tmp_path_factory):
    """The exports of a run that was scored here, in every form."""
    to = tmp_path_factory.mktemp("forms")
    for form in FORMS:
        exported(scored, form, to / form)
    return to


@pytest.fixture
def where(tmp_path, tiny_model):
    """A directory with the data and configuration of the scored run, and an empty store."""
    data = write_rows(tmp_path / "preferences.jsonl", preference_rows(24))
    experiment(tmp_path, tiny_model, data, reference={"dtype": "float32"})
    return tmp_path


def run(where, *arguments, code=0):
    return refscore_here(where, *arguments, code=code)


def imported(where, data, *options, by="Lab A", code=0):
    return run(where, "import", data, "--config", "experiment.yaml", "--by", by, *options, code=code)


def precompute(where, *options, code=0, name="r"):
    return run(where, "precompute", "--config", "experiment.yaml", "--run", name, *BY, *options, code=code)


def lines(forms):
    """The rows of the form jsonl, of both splits."""
    return [json.loads(line) for split in ("train", "test") for line in (forms / f"jsonl/{split}.jsonl").open()]


def pairs(where, name="r"):
    return pl.DataFrame(read_table(where / f"data/runs/{name}/pairs.parquet", PAIRS))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_exported_comes_back(scored, forms, where, form):
    said = imported(where, forms / form)
    assert f"the form {form}" in said
    assert "24 read, 24 kept" in said
    assert "48 imported; in" in said
    assert "covered   48 of 48 sequences" in said
    said = precompute(where)
    assert "48 imported" in said
    assert "imported by Lab A, unverified, dtype float32; no engine is started" in said
    ours, theirs = pairs(where), pairs(scored)
    # open-instruct's cache is float32
    tolerance = {"rel": 1e-6} if form == "open_instruct" else {"rel": 0, "abs": 0}
    for name in SUMS:
        assert ours[name].to_list() == pytest.approx(theirs[name].to_list(), **tolerance)
    for name in VALUES:
        assert ours[name].to_list() == (theirs[name].to_list() if form == "jsonl" else [None] * 24)
    ours, theirs = (table.drop(*SUMS, *VALUES, "source") for table in (ours, theirs))
    assert ours.equals(theirs)
    assert ("48 by their sum alone" in said) == (form != "jsonl")


@pytest.mark.parametrize("form", ["trl", "jsonl"])
def test_a_training_on_them_begins_at_log_2_and_passes_the_gate(forms, where, form):
    imported(where, forms / form)
    precompute(where)
    said = run(where, "train", "--config", "experiment.yaml", "--run", "r", *BY)
    assert "gate      passed" in said
    assert ("of the mean of each response" in said) == (form == "trl")
    metrics = pl.read_parquet(where / "data/runs/r/metrics.parquet")
    assert metrics.filter(pl.col("step") == 0)["eval_loss"].item() == pytest.approx(0.6931, abs=1e-4)
    assert json.loads((where / "data/runs/r/gate.json").read_text())["compared"] == (
        "sums" if form == "trl" else "tokens"
    )
    card = (where / "data/runs/r/model/README.md").read_text()
    assert "log-probabilities that Lab A computed (imported, unverified)" in card


def test_sums_and_values_per_token_train_alike(forms, where):
    """Losses of sums of float32 values in float64 are the same, whoever adds them."""
    for form, name in (("trl", "Lab A"), ("jsonl", "Lab B")):
        imported(where, forms / form, by=name)
        whose = [*BY[:3], f"reference.imported_by={name}"]
        for stage in ("precompute", "train"):
            run(where, stage, "--config", "experiment.yaml", "--run", form, *whose)
    losses = [
        pl.read_parquet(where / f"data/runs/{form}/metrics.parquet")["loss"].to_list() for form in ("trl", "jsonl")
    ]
    assert losses[0] == losses[1]
    assert len(list((where / "data/store").glob("*/reference.json"))) == 2


def test_the_identity_says_who_and_that_nobody_verified(forms, where):
    imported(where, forms / "trl")
    (file,) = (where / "data/store").glob("*/reference.json")
    assert json.loads(file.read_text())["numerics"] == {
        "engine": "imported",
        "engine_version": "unknown",
        "device": "unknown",
        "dtype": "float32",
        "logits_dtype": "unknown",
        "quantization": "unknown",
        "imported_by": "Lab A",
        "verified": "no",
    }
    assert "imported by Lab A, unverified, dtype float32" in run(where, "store", "ls")
    precompute(where)
    assert read_about(where / "data/runs/r/pairs.parquet")["imported_by"] == "Lab A"


def test_they_are_used_where_they_are_asked_for_alone(forms, where):
    imported(where, forms / "trl")
    plan = ["precompute", "--config", "experiment.yaml", "--plan"]
    assert "0 hits, 48 misses" in run(where, *plan)
    other = ["--set", "reference.engine=imported", "--set", "reference.imported_by=Lab B"]
    assert "0 imported, 48 missing" in run(where, *plan, *other)
    assert "0 imported, 48 missing" in run(where, *plan, *BY, "--set", "reference.dtype=auto")
    assert "48 imported" in run(where, *plan, *BY)


def test_scores_of_this_machine_are_not_taken_for_imported_ones(scored, where):
    shutil.copytree(scored / "data/store", where / "data/store")
    said = precompute(where, code=3)
    assert "48 of 48 sequences have no score imported by 'Lab A' (first: " in said
    assert "reference.engine=vllm" in said


def test_what_is_missing_is_counted_and_nothing_is_computed(forms, where, tmp_path):
    imported(where, write_rows(where / "part.jsonl", lines(forms)[:5]))
    said = precompute(where, code=3)
    assert "38 of 48 sequences have no score imported by 'Lab A'" in said
    assert "38 of 48 sequences" in run(where, "plan", "--config", "experiment.yaml", *BY)
    assert not open_run("r").pairs.exists()
    assert "38 of 48" in run(where, "train", "--config", "experiment.yaml", "--run", "r", *BY, code=3)


def test_verify_passes_for_true_sums(forms, where):
    imported(where, forms / "trl")
    precompute(where)
    said = run(where, "verify", "--run", "r", "--rows", "6")
    assert "passed for the scores of 6 pairs, imported from Lab A" in said
    assert "there are no values per token" in said
    kept = json.loads((where / "data/runs/r/verify.json").read_text())
    assert kept["compared"] == "sums"
    assert kept["imported_by"] == "Lab A"
    assert kept["max_absolute_difference"] < 1e-4
    said = run(where, "verify", "--run", "r", "--rows", "6", "--engines", "transformers:bfloat16")
    assert "transformers:bfloat16" in said
    assert "cannot be computed" in run(where, "verify", "--run", "r", "--engines", "imported", code=2)


@pytest.mark.parametrize("form", ["trl", "jsonl"])
def test_scores_of_another_model_are_found_out(forms, where, form):
    """By the gate before the first step, and by verify; a dtype that is not known has the widest limits."""
    other = make_tiny_model(where / "other", seed=1)
    whose = ["--set", f"reference.model={other}", "--set", f"policy.model={other}", "--set", "reference.dtype=auto"]
    imported(where, forms / form, *whose)
    precompute(where, *whose)
    said = run(where, "verify", "--run", "r", "--rows", "6", code=4)
    assert "they belong to another model" in said
    said = run(where, "train", "--config", "experiment.yaml", "--run", "r", *BY, *whose, code=4)
    assert "the imported scores are those of another model" in said


def test_one_wrong_sum_is_found(forms, where):
    rows = lines(forms)
    for row in rows:
        row.update(dict.fromkeys(VALUES))
    rows[3]["ref_chosen_logps"] -= 0.5
    imported(where, write_rows(where / "wrong.jsonl", rows))
    precompute(where)
    assert "sums were compared" in run(where, "verify", "--run", "r", "--rows", "24", code=4)


def test_what_needs_values_per_token_is_refused_before_anything_else(forms, where):
    imported(where, forms / "trl")
    weighed = ["--set", "train.ld_alpha=0.5"]
    for command in ("precompute", "plan"):
        said = run(where, command, "--config", "experiment.yaml", *BY, *weighed, code=2)
        assert "48 of 48 imported scores are sums of responses" in said
    precompute(where)
    said = run(where, "train", "--config", "experiment.yaml", "--run", "r", *BY, *weighed, code=2)
    assert "train.ld_alpha weighs tokens" in said
    assert not (where / "data/runs/r/training.json").exists()
    # values per token do
    imported(where, forms / "jsonl", by="Lab B")
    whose = [*BY[:3], "reference.imported_by=Lab B"]
    for stage in ("precompute", "train"):
        run(where, stage, "--config", "experiment.yaml", "--run", "b", *whose, *weighed)


@pytest.mark.parametrize("loss", ["ipo", "sigmoid_norm", "aot", "bco_pair"])
def test_losses_of_sums_work(forms, where, loss):
    imported(where, forms / "trl")
    settings = ["--set", f"train.loss_type={loss}", "--set", "train.max_steps=1"]
    precompute(where, *settings)
    run(where, "train", "--config", "experiment.yaml", "--run", "r", *BY, *settings)


def test_new_responses_are_not_scored_as_imported(where):
    write_rows(where / "responses.jsonl", [{"prompt": "Hi?", "response": "Yes."}])
    for more in ([], ["--top-k", "2"]):
        said = run(
            where, "score", "responses.jsonl", "--out", "o.parquet", "--config", "experiment.yaml", *BY, *more, code=2
        )
        assert "none can be computed for other sequences" in said
        assert "reference.engine=vllm" in said


def test_what_was_imported_is_exported_as_that(forms, where, tmp_path):
    imported(where, forms / "trl")
    precompute(where)
    for form in FORMS:
        exported(where, form, tmp_path / form)
        assert "by Lab A, as refscore was told and did not verify" in (tmp_path / form / "README.md").read_text()
    row = json.loads((tmp_path / "jsonl/train.jsonl").open().readline())
    assert row["ref_chosen_token_logps"] is None
    assert row["ref_chosen_logps"] < 0
    # and once more, under another name
    imported(where, tmp_path / "jsonl", by="Lab B")


def test_the_store_s_commands_work_with_it(forms, where, tmp_path):
    for form in ("train.parquet", "test.parquet"):
        imported(where, forms / "trl" / form)
    run(where, "store", "verify")
    other = str(tmp_path / "elsewhere")
    run(where, "store", "push", other)
    assert "48 sequences in 2 shards" in run(where, "store", "pull", other, "--store", tmp_path / "third")
    part = run(where, "store", "pull", other, "--store", tmp_path / "fourth", "--config", "experiment.yaml", *BY)
    assert "copied    48 sequences" in part
    assert "merged 2 shards" in run(where, "store", "gc", "--apply")
    run(where, "store", "verify")
    assert "48 hits, 0 misses" in run(where, "store", "explain", "--config", "experiment.yaml", *BY)
    precompute(where)
    precompute(where, "--set", f"reference.store={tmp_path / 'fourth'}", name="fourth")
    assert pairs(where).equals(pairs(where, "fourth"))


def test_tidying_says_what_cannot_be_computed_again(forms, where):
    imported(where, forms / "trl")
    (reference,) = (where / "data/store").iterdir()
    for path in [*reference.iterdir(), reference]:
        os.utime(path, (0, 0))
    said = run(where, "store", "gc")
    assert "used by no run" in said
    assert "these scores were imported, and cannot be computed again" in said


def test_importing_twice_imports_nothing(forms, where):
    imported(where, forms / "trl")
    said = imported(where, forms / "jsonl")
    assert "0 imported, 48 that were imported before" in said
    assert "of 48 of them the store keeps the sum alone" in said


def test_values_per_token_and_sums_stand_side_by_side(forms, where):
    """The held-out pairs by their sums, the others token by token."""
    imported(where, forms / "jsonl/train.jsonl")
    imported(where, forms / "trl/test.parquet")
    precompute(where)
    nulls = pairs(where).group_by("split").agg(pl.col(VALUES[0]).null_count())
    table = dict(nulls.iter_rows())
    assert table["train"] == 0
    assert table["eval"] == pairs(where).filter(pl.col("split") == "eval").height
    run(where, "store", "gc", "--apply")
    run(where, "store", "verify")
    run(where, "train", "--config", "experiment.yaml", "--run", "r", *BY)
    run(where, "verify", "--run", "r")


def test_means_of_open_instruct_are_read_where_there_are_no_sums(scored, forms, where, tmp_path):
    means = shutil.copytree(forms / "open_instruct", tmp_path / "means")
    for file in means.glob("*_reference_logprobs.pt"):
        file.unlink()
    imported(where, means)
    precompute(where)
    for name in SUMS:
        assert pairs(where)[name].to_list() == pytest.approx(pairs(scored)[name].to_list(), rel=1e-6)


def test_a_data_set_that_datasets_saved_is_read(forms, where, tmp_path):
    import datasets

    files = {split: str(forms / f"trl/{split}.parquet") for split in ("train", "test")}
    held = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    held.save_to_disk(str(tmp_path / "saved"))
    assert "24 read, 24 kept" in imported(where, tmp_path / "saved")


def test_evaluation_scores_new_responses_with_an_engine(where):
    from pipeline.config.files import load_config
    from pipeline.engines.reference import open_for_new, open_reference

    config = load_config(where / "experiment.yaml", [BY[1], BY[3]]).reference
    said = []

    class Says:
        def say(self, text):
            said.append(text)

    opened = open_for_new(config, Says())
    assert opened.numerics.engine == "vllm"
    assert opened.config.imported_by is None
    assert opened.identity.reference_id != open_reference(config).identity.reference_id
    assert said == [
        "reference scores imported by 'Lab A' are of the pairs alone: new responses are scored here, by vllm"
    ]
    assert not torch.cuda.is_available() or opened.numerics.device == "cuda"


def test_what_differs_from_what_was_imported_is_explained(forms, where):
    imported(where, forms / "trl", "--set", "reference.dtype=auto")
    said = run(where, "store", "explain", "--config", "experiment.yaml", *BY)
    assert "0 hits, 48 misses" in said
    assert "numerics: dtype 'unknown' -> 'float32'" in said


def test_rounds_that_would_need_new_scores_are_refused_before_the_first(where):
    said = run(where, "iterate", "--config", "experiment.yaml", "--run", "r", "--rounds", "2", *BY, code=2)
    assert "later rounds make new pairs" in said
    assert not (where / "data/runs").exists()


def test_what_sums_cannot_do_is_not_advised(forms, where):
    longer = "chosen is longer than rejected"
    for form, by, advised in (("trl", "Lab A", False), ("jsonl", "Lab B", True)):
        imported(where, forms / form, by=by)
        said = run(where, "precompute", "--config", "experiment.yaml", "--plan", *BY[:3], f"reference.imported_by={by}")
        assert longer in said
        assert ("train.ld_alpha=0.5" in said) == advised


def test_a_name_that_looks_like_a_number_is_shown_as_it_is_typed(forms, where):
    said = imported(where, forms / "trl", by="1.5")
    assert "--set 'reference.imported_by=\"1.5\"'" in said
    whose = [*BY[:3], 'reference.imported_by="1.5"']
    assert "48 imported" in run(where, "precompute", "--config", "experiment.yaml", "--plan", *whose)


@pytest.mark.parametrize("loss", ["simpo", "cpo"])
def test_losses_without_a_reference_need_no_import(where, loss):
    settings = ["--set", f"train.loss_type={loss}", "--set", "train.max_steps=1"]
    precompute(where, *settings)
    run(where, "train", "--config", "experiment.yaml", "--run", "r", *BY, *settings)


def test_pairs_whose_sums_are_damaged_are_not_trained_on(forms, where):
    imported(where, forms / "trl")
    precompute(where)
    path = where / "data/runs/r/pairs.parquet"
    about, rows = read_about(path), read_table(path, PAIRS).to_pylist()
    for value in (None, float("nan"), float("-inf"), 0.5):
        rows[1]["ref_rejected_logps"] = value
        write_table(path, pa.Table.from_pylist(rows, schema=PAIRS), about)
        said = run(where, "train", "--config", "experiment.yaml", "--run", "r", *BY, code=3)
        assert f"pair {rows[1]['pair_id']} has no score for rejected" in said
    # and of scores that were computed a sum alone is none
    rows[1]["ref_rejected_logps"] = -5.0
    del about["imported_by"]
    write_table(path, pa.Table.from_pylist(rows, schema=PAIRS), about)
    with pytest.raises(DataError, match="no whole set of scores"):
        load_pairs(path, "train")


def test_pairs_with_the_scores_of_one_are_not_taken_for_those_of_another(forms, where):
    imported(where, forms / "trl")
    precompute(where)
    others = [*BY[:3], "reference.imported_by=Lab B"]
    said = run(where, "train", "--config", "experiment.yaml", "--run", "r", *others, code=3)
    assert "48 of 48 sequences have no score imported by 'Lab B'" in said
    run(where, "train", "--config", "experiment.yaml", "--run", "r", "--set", "reference.engine=transformers", code=2)


def test_what_trl_computes_itself_is_taken_and_true(where, tiny_model, tmp_path):
    """TRL tokenises plain texts, computes the reference's sums, and its data set is saved."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(
        output_dir=str(tmp_path / "out"), precompute_ref_log_probs=True, max_length=None, max_steps=1, bf16=False,
        report_to="none", save_strategy="no", use_cpu=True,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(preference_rows(24)),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
    )
    trainer.train()
    trainer.train_dataset.save_to_disk(str(tmp_path / "theirs"))
    plain = ["--set", "data.template=none"]
    assert "covered   48 of 48 sequences" in imported(where, tmp_path / "theirs", *plain)
    precompute(where, *plain)
    assert "gate      passed" in run(where, "train", "--config", "experiment.yaml", "--run", "r", *BY, *plain)
    assert "passed for the scores of 24 pairs" in run(where, "verify", "--run", "r", "--rows", "24")
