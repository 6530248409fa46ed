"""pairs.parquet is of its reference as it is now: files that change under one name are noticed before anything is trained."""

import json
import shutil

import huggingface_hub.constants
import pytest

from pipeline.artifacts.schemas import PAIRS
from pipeline.artifacts.tables import read_about, read_table, write_table
from pipeline.config.files import load_config
from pipeline.errors import DataError
from pipeline.precompute import pairs_file
from pipeline.training.resume import training_digest
from tests.conftest import experiment, make_tiny_model, preference_rows, refscore_here, write_rows
from tests.hub import CODED, FIRST, in_hub_cache, with_code


@pytest.fixture
def where(tmp_path, tiny_model):
    shutil.copytree(tiny_model, tmp_path / "reference")
    config = experiment(tmp_path, tiny_model, write_rows(tmp_path / "d.jsonl", preference_rows(8)))
    refscore_here(tmp_path, "precompute", "--config", config, "--run", "r", "--set", "reference.model=reference")
    return tmp_path


def train(where, code=0):
    options = ("--config", "experiment.yaml", "--run", "r", "--set", "train.max_steps=1")
    return refscore_here(where, "train", *options, "--set", "reference.model=reference", "--restart", code=code)


def test_other_weights_under_the_same_name_are_not_the_reference_of_the_pairs(where):
    kept = shutil.copytree(where / "reference", where / "kept")
    make_tiny_model(where / "reference", seed=1)
    said = train(where, code=2)
    assert "16 of 16 sequences have no stored score" in said
    assert "run 'refscore precompute'" in said
    # and back again: everything is in the store
    shutil.rmtree(where / "reference")
    kept.rename(where / "reference")
    train(where)


def test_another_template_under_the_same_name_is_noticed(where):
    template = where / "reference" / "chat_template.jinja"
    template.write_text("the cat " + template.read_text())
    assert "no stored score" in train(where, code=2)


def test_a_configuration_that_computes_other_numbers_is_noticed(where):
    path = where / "reference" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-2}))
    assert "no stored score" in train(where, code=2)


def test_a_reference_that_is_not_at_hand_is_not_needed(where):
    (where / "reference").rename(where / "gone")
    assert "gate" in train(where)


def test_an_engine_that_was_updated_since_makes_no_score_untrue(where, monkeypatch):
    monkeypatch.setattr("pipeline.engines.protocol.importlib.metadata.version", lambda name: "99")
    assert "gate      passed" in train(where)


def test_the_gate_does_not_apply_to_another_configuration_of_the_references_weights(where):
    """It is measured and said: two models, however equal their weights are."""
    policy = shutil.copytree(where / "reference", where / "policy")
    path = policy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1.0}))
    options = ("--config", "experiment.yaml", "--run", "r", "--set", "train.max_steps=1")
    said = refscore_here(where, "train", *options, "--set", "reference.model=reference", "--set", "policy.model=policy")
    assert "gate      does not apply (the policy has the reference's weights, but not its configuration" in said
    assert not json.loads((where / "data/runs/r/gate.json").read_text())["applies"]


def test_auto_precision_of_another_machine_is_another_training(where, monkeypatch):
    options = (
        "--config",
        "experiment.yaml",
        "--run",
        "r",
        "--set",
        "train.max_steps=1",
        "--set",
        "train.precision=auto",
    )
    options = (*options, "--set", "reference.model=reference")
    for bfloat16 in (False, True):
        monkeypatch.setattr("pipeline.training.policies.multiplies_bfloat16", lambda known=bfloat16: known)
        said = refscore_here(where, "train", *options, code=2 if bfloat16 else 0)
    assert "train.precision: 'float32' -> 'bfloat16'" in said
    assert "precision | float32" in (where / "data/runs/r/model/README.md").read_text()


@pytest.mark.parametrize("lacks", ["all weights", "a shard", "nothing"])
def test_a_cache_that_holds_a_part_of_the_reference_does_not_hold_it(where, monkeypatch, tiny_model, lacks):
    """As the Hub's cache after somebody asked for the tokenizer alone: the reference is not at hand, and not needed."""
    cache = where / "hub"
    snapshot = in_hub_cache(cache, FIRST, where / "reference")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    options = ("--config", "experiment.yaml", "--run", "hub", "--set", "reference.model=tests/tiny")
    options = (*options, "--set", "train.max_steps=1")
    refscore_here(where, "precompute", *options)
    if lacks == "all weights":
        (snapshot / "model.safetensors").unlink()
    elif lacks == "a shard":
        (snapshot / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert "gate" in refscore_here(where, "train", *options)
    # and what is not at hand is still asked for if it must be read
    shutil.rmtree(where / "data/store")
    if lacks != "nothing":
        refscore_here(where, "precompute", *options, code=2)


def test_a_policys_code_is_part_of_its_training(where):
    policy = shutil.copytree(where / "reference", where / "policy")
    with_code(policy)
    about = {"reference_id": "r", "inputs_digest": "i", "source_digests": {}}
    found = []
    for code in ("", "# another"):
        (policy / "coded.py").write_text((policy / "coded.py").read_text() + code)
        for trusted in ("true", "false"):
            settings = [f"policy.trust_remote_code={trusted}", f"policy.revision={CODED}"]
            found.append(training_digest(load_config(where / "experiment.yaml", settings), about, policy))
    assert len(set(found)) == 3  # what is not run does not count
    assert found[1] == found[3]


def as_format_one(path):
    """pairs.parquet as format 1 had it: the lists under the names that hold sums now."""
    sides = ("chosen", "rejected")
    table, about = read_table(path, PAIRS), read_about(path)
    names = {f"ref_{side}_logps": f"ref_{side}_logp" for side in sides}
    names |= {f"ref_{side}_token_logps": f"ref_{side}_logps" for side in sides}
    table = table.rename_columns([names.get(name, name) for name in table.column_names])
    write_table(path, table.replace_schema_metadata(None), about)


@pytest.mark.parametrize("text", ["The cat sat.", "The cat <|end|> sat."])
def test_a_format_of_its_own_makes_no_other_training_of_a_finished_one(tmp_path, tiny_model, monkeypatch, text):
    """Made by an earlier version, whose digest knew no data.special_tokens; a text that names one means another thing."""
    rows = [*preference_rows(8), {"prompt": "Hi?", "chosen": text, "rejected": "No."}]
    config = experiment(tmp_path, tiny_model, write_rows(tmp_path / "d.jsonl", rows))

    def of_before(config):
        data = config.data.model_dump(mode="json", exclude={"special_tokens", "workers"})
        return pairs_file._digest_with(data, config.reference)

    with monkeypatch.context() as before:
        before.setattr(pairs_file, "inputs_digest", of_before)
        for stage in ("precompute", "train"):
            refscore_here(tmp_path, stage, "--config", config, "--run", "r")
    pairs = tmp_path / "data/runs/r/pairs.parquet"
    as_format_one(pairs)
    with pytest.raises(DataError, match="format 1"):
        read_table(pairs, PAIRS)
    same = text == "The cat sat."
    refscore_here(tmp_path, "precompute", "--config", config, "--run", "r")
    read_table(pairs, PAIRS)
    said = refscore_here(tmp_path, "train", "--config", config, "--run", "r", code=0 if same else 2)
    assert ("nothing to train" if same else "already holds a training with other settings") in said
    # of another configuration the digest is its own
    other = ("--config", config, "--run", "r", "--set", "data.eval_fraction=0.5")
    refscore_here(tmp_path, "precompute", *other)
    assert "data.eval_fraction: 0.25 -> 0.5" in refscore_here(tmp_path, "train", *other, code=2)


def test_a_training_makes_pairs_of_an_earlier_format_anew_by_itself(tmp_path, tiny_model):
    """From the store alone: the engine that scored them is not there, and no precompute comes first."""
    config = experiment(tmp_path, tiny_model, write_rows(tmp_path / "d.jsonl", preference_rows(8)))
    for stage in ("precompute", "train"):
        refscore_here(tmp_path, stage, "--config", config, "--run", "r")
    pairs = tmp_path / "data/runs/r/pairs.parquet"
    before = read_table(pairs, PAIRS)
    as_format_one(pairs)
    assert "nothing to train" in refscore_here(tmp_path, "train", "--config", config, "--run", "r")
    assert read_table(pairs, PAIRS).equals(before)
