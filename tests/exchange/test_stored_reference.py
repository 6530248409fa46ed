"""TRL's own DPOTrainer trains from our scores, and refuses what it would misread."""

import math
import sys

import numpy as np
import pytest
import torch

from tests.exchange.conftest import pairs_of


@pytest.fixture
def stored_reference(for_trl, monkeypatch):
    """The module that lies beside the data, as its user imports it."""
    monkeypatch.syspath_prepend(str(for_trl))
    monkeypatch.delitem(sys.modules, "stored_reference", raising=False)
    import stored_reference

    assert stored_reference.__file__ == str(for_trl / "stored_reference.py")
    return stored_reference


def arguments(tmp_path, **changed):
    from trl import DPOConfig

    settings = {
        "output_dir": str(tmp_path / "out"), "precompute_ref_log_probs": True, "max_length": None, "beta": 0.1,
        "per_device_train_batch_size": 4, "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3, "bf16": False,
        "report_to": "none", "save_strategy": "no", "use_cpu": True,
    }  # fmt: skip
    return DPOConfig(**{**settings, **changed})


def loaded(model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), AutoTokenizer.from_pretrained(model)


def test_the_export_is_a_data_set_that_datasets_loads(scored, for_trl, tmp_path):
    from datasets import load_dataset

    data = load_dataset(str(for_trl), cache_dir=str(tmp_path))
    assert set(data) == {"train", "test"}
    for split, ours in (("train", "train"), ("test", "eval")):
        pairs = pairs_of(scored, ours)
        assert data[split].column_names == [
            "pair_id", "prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"
        ]  # fmt: skip
        for name in data[split].column_names:
            assert list(data[split][name]) == pairs[name].to_list()


def test_trl_trains_from_it_without_a_reference_and_as_from_its_own_precomputation(
    for_trl, stored_reference, tiny_model, tmp_path
):
    from datasets import load_dataset
    from trl import DPOTrainer

    data = load_dataset(str(for_trl), cache_dir=str(tmp_path / "cache"))

    class Own(DPOTrainer):
        """TRL's own way on the same ids: it computes the reference, and its data has no scores of ours."""

        def _prepare_dataset(self, dataset, *_, **__):
            return dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])

    def run(trainer_class):
        model, tokenizer = loaded(tiny_model)
        trainer = trainer_class(
            model=model, args=arguments(tmp_path), train_dataset=data["train"], eval_dataset=data["test"],
            processing_class=tokenizer,
        )  # fmt: skip
        assert trainer.ref_model is None
        trainer.train()
        return trainer

    stored, own = run(stored_reference.StoredReferenceTrainer), run(Own)
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        np.testing.assert_allclose(stored.train_dataset[name], own.train_dataset[name], atol=1e-4)
    losses = [[line["loss"] for line in trainer.state.log_history if "loss" in line] for trainer in (stored, own)]
    assert losses[0][0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert stored.evaluate()["eval_loss"] == pytest.approx(own.evaluate()["eval_loss"], abs=1e-4)


def test_another_model_is_noticed_before_it_trains(for_trl, stored_reference, tmp_path):
    from datasets import load_dataset

    from tests.conftest import make_tiny_model

    data = load_dataset(str(for_trl), cache_dir=str(tmp_path / "cache"))
    make_tiny_model(tmp_path / "other", seed=5)
    model, tokenizer = loaded(tmp_path / "other")

    def trainer(of=stored_reference.StoredReferenceTrainer):
        return of(model=model, args=arguments(tmp_path), train_dataset=data["train"], processing_class=tokenizer)

    with pytest.raises(ValueError, match=r"chosen log-probabilities differ .* not the model that was scored"):
        trainer()

    class Elsewhere(stored_reference.StoredReferenceTrainer):
        check_pairs = 0

    assert trainer(Elsewhere).ref_model is None


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"precompute_ref_log_probs": False}, "set precompute_ref_log_probs=True"),
        ({"max_length": 20}, "would cut sequences of up to"),
        ({"ld_alpha": 0.5}, "ld_alpha weighs tokens"),
    ],
)
def test_settings_that_the_scores_do_not_fit_are_refused(
    for_trl, stored_reference, tiny_model, tmp_path, changed, problem
):
    from datasets import load_dataset

    data = load_dataset(str(for_trl), cache_dir=str(tmp_path / "cache"))
    model, tokenizer = loaded(tiny_model)
    with pytest.raises(ValueError, match=problem):
        stored_reference.StoredReferenceTrainer(
            model=model, args=arguments(tmp_path, **changed), train_dataset=data["train"], processing_class=tokenizer
        )


def test_a_trainer_that_passes_the_preparation_by_does_not_train(for_trl, stored_reference, tiny_model, tmp_path):
    """As LLaMA-Factory's does, whose constructor is that of transformers' Trainer: no score would be used, without a word."""
    from datasets import load_dataset
    from transformers import Trainer
    from trl import DPOTrainer

    class OfItsOwn(DPOTrainer):
        def __init__(self, **kwargs):
            Trainer.__init__(self, **kwargs)

    class Mixed(stored_reference.StoredReference, OfItsOwn):
        pass

    data = load_dataset(str(for_trl), cache_dir=str(tmp_path / "cache"))
    trainer = Mixed(model=loaded(tiny_model)[0], args=arguments(tmp_path), train_dataset=data["train"])
    with pytest.raises(ValueError, match="Mixed does not prepare its data as TRL's"):
        trainer.train()


def test_data_without_scores_is_refused(for_trl, stored_reference, tiny_model, tmp_path):
    from datasets import load_dataset

    data = load_dataset(str(for_trl), cache_dir=str(tmp_path / "cache"))["train"].remove_columns("ref_chosen_logps")
    model, tokenizer = loaded(tiny_model)
    with pytest.raises(ValueError, match="the train data lacks ref_chosen_logps"):
        stored_reference.StoredReferenceTrainer(
            model=model, args=arguments(tmp_path), train_dataset=data, processing_class=tokenizer
        )


def changed_rows(data, rows, column="ref_chosen_logps", value=-999.0):
    """The data set with another value in some rows."""
    values = list(data[column])
    for row in rows:
        values[row] = value
    return data.remove_columns(column).add_column(column, values)


def stored_trainer(stored_reference, tiny_model, tmp_path, **given):
    model, tokenizer = loaded(tiny_model)
    return stored_reference.StoredReferenceTrainer(
        model=model, args=arguments(tmp_path), processing_class=tokenizer, **given
    )


def test_wrong_scores_are_noticed_wherever_they_lie(for_trl, stored_reference, tiny_model, tmp_path):
    from datasets import load_dataset

    data = load_dataset(str(for_trl), cache_dir=str(tmp_path / "cache"))
    train, test = data["train"], data["test"]
    assert len(train) > 16
    with pytest.raises(ValueError, match="in the eval data: it is not the model"):
        stored_trainer(
            stored_reference,
            tiny_model,
            tmp_path,
            train_dataset=train,
            eval_dataset=changed_rows(test, range(len(test))),
        )
    with pytest.raises(ValueError, match="in the other data: it is not the model"):
        stored_trainer(
            stored_reference, tiny_model, tmp_path, train_dataset=train,
            eval_dataset={"test": test, "other": changed_rows(test, [len(test) - 1])},
        )  # fmt: skip
    with pytest.raises(ValueError, match="in the train data: it is not the model"):
        stored_trainer(stored_reference, tiny_model, tmp_path, train_dataset=changed_rows(train, range(8, len(train))))


@pytest.mark.parametrize(
    ("column", "value"), [("ref_chosen_logps", None), ("ref_rejected_logps", math.nan), ("ref_chosen_logps", -math.inf)]
)
def test_a_score_that_is_none_is_refused(for_trl, stored_reference, tiny_model, tmp_path, column, value):
    from datasets import load_dataset

    data = load_dataset(str(for_trl), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=f"{column} of the train data holds null"):
        stored_trainer(
            stored_reference, tiny_model, tmp_path, train_dataset=changed_rows(data["train"], [3], column, value)
        )


def test_a_list_of_scores_per_response_is_refused(for_trl, stored_reference, tiny_model, tmp_path):
    """As in pairs.parquet of before, where the names held one value per token."""
    from datasets import load_dataset

    data = load_dataset(str(for_trl), cache_dir=str(tmp_path / "cache"))["train"]
    data = data.remove_columns("ref_chosen_logps").add_column("ref_chosen_logps", [[-1.0, -2.0]] * len(data))
    with pytest.raises(ValueError, match="no finite number"):
        stored_trainer(stored_reference, tiny_model, tmp_path, train_dataset=data)


def test_streamed_data_and_a_reference_model_are_refused(for_trl, stored_reference, tiny_model, tmp_path):
    from datasets import load_dataset

    streamed = load_dataset(str(for_trl), streaming=True, split="train")
    with pytest.raises(ValueError, match="the train data is streamed"):
        stored_trainer(stored_reference, tiny_model, tmp_path, train_dataset=streamed)
    data = load_dataset(str(for_trl), cache_dir=str(tmp_path / "cache"))["train"]
    with pytest.raises(ValueError, match="leave ref_model out"):
        stored_trainer(stored_reference, tiny_model, tmp_path, train_dataset=data, ref_model=loaded(tiny_model)[0])


def test_a_trl_that_would_never_ask_for_the_stored_scores_is_refused(for_trl, stored_reference, monkeypatch):
    from trl import DPOTrainer

    monkeypatch.delattr(DPOTrainer, "_precompute_ref_logps")
    monkeypatch.delitem(sys.modules, "stored_reference")
    with pytest.raises(ImportError, match="has no _precompute_ref_logps: install trl"):
        __import__("stored_reference")
