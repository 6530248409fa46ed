"""pairs.parquet is of its reference as it is now: files that change under one name are noticed before anything is trained."""

import json
import shutil

import huggingface_hub.constants
import pytest

from pipeline.config.files import load_config
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
