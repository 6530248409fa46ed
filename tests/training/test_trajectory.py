"""Fed the same batches, our trainer follows TRL's with a live reference model."""

import copy

import pytest
import torch

from pipeline.config.training import PolicyConfig, TrainConfig
from pipeline.forward.logps import forward_of
from pipeline.models.load import load_causal_lm, load_tokenizer
from pipeline.training.inputs.pairs import load_pairs
from pipeline.training.optimizers import make_optimizer, update
from pipeline.training.step import train_step
from tests.training.test_step import rows_of, score, write_pairs

STEPS, BATCH, RATE, BETA = 20, 4, 1e-3, 0.3


def trls_losses(model, rows, tokenizer, where):
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import DPOConfig, DPOTrainer

    class InOrder(DPOTrainer):
        """TRL's trainer on given token ids, in their order."""

        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset)

    trainer = InOrder(
        model=copy.deepcopy(model),
        ref_model=copy.deepcopy(model),
        args=DPOConfig(
            output_dir=str(where), per_device_train_batch_size=BATCH, max_steps=STEPS, learning_rate=RATE, beta=BETA,
            lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=1.0, logging_steps=1, save_strategy="no", bf16=False,
            use_cpu=True, report_to=[], gradient_checkpointing=False, seed=0, weight_decay=0.0, optim="adamw_torch_fused",
            max_length=None, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("layout", ["tree", "separate"])
def test_losses_follow_trls_over_twenty_steps(tmp_path, tiny_model, layout):
    spec = PolicyConfig(model=str(tiny_model))
    model = load_causal_lm(tiny_model, spec, torch.float32)
    rows = rows_of(STEPS * BATCH)
    expected = trls_losses(model, rows, load_tokenizer(tiny_model, spec), tmp_path / "trl")
    pairs = load_pairs(write_pairs(tmp_path / "pairs.parquet", rows, score(model, rows)), "train")
    train = TrainConfig(learning_rate=RATE, beta=BETA, per_device_train_batch_size=BATCH, layout=layout)
    optimizer, forward = make_optimizer(model, train), forward_of(model, layout)
    found = []
    for step in range(STEPS):
        found.append(train_step(forward, pairs, range(step * BATCH, (step + 1) * BATCH), train)["loss"])
        update(model, optimizer, RATE, train.max_grad_norm)
    assert max(found) - min(found) > 0.2
    assert found == pytest.approx(expected, abs=1e-4)
