"""TRL's DPOTrainer on reference log-probabilities that are stored: no reference model in memory, none of them computed again.

This file needs trl and nothing of refscore; `refscore export --format trl` puts a copy of it beside the data:

    from datasets import load_dataset
    from stored_reference import StoredReferenceTrainer
    from trl import DPOConfig

    data = load_dataset("DIR")
    args = DPOConfig(precompute_ref_log_probs=True, max_length=None)
    StoredReferenceTrainer("my/model", args=args, train_dataset=data["train"], eval_dataset=data["test"]).train()

`StoredReference` does the same for a trainer derived from TRL's: class MyTrainer(StoredReference, TheirDPOTrainer).
"""

from __future__ import annotations

import warnings
from typing import Any

from trl import DPOTrainer  # type: ignore[attr-defined]  # it is a lazy module

_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_SCORES = ("ref_chosen_logps", "ref_rejected_logps")
# nats per token that the arithmetic of bfloat16 may move a sum by; another model, or another template, moves it by tenths
_TOLERANCE = 0.02


class StoredReference:
    """Put before a DPO trainer of TRL: it takes token ids and reference scores from the data as they are.

    `check_pairs`: pairs that the policy is compared with before training, which must then start as the reference; 0 if it
    starts from other weights.
    """

    check_pairs = 8

    def _prepare_dataset(self, dataset: Any, _processing_class: Any, args: Any, dataset_name: str) -> Any:
        missing = [name for name in _IDS + _SCORES if name not in (dataset.column_names or ())]
        if missing:
            raise ValueError(
                f"the {dataset_name} data lacks {', '.join(missing)}: export it with refscore export --format trl"
            )
        if not args.precompute_ref_log_probs:
            raise ValueError(
                "set precompute_ref_log_probs=True: without it TRL loads a reference model and reads no scores"
            )
        if args.ld_alpha is not None:
            raise ValueError("ld_alpha weighs tokens, and the stored scores are sums over them: leave it out")
        longest = max(_longest(rows) for rows in dataset.with_format("arrow").iter(8192))
        if args.max_length is not None and args.max_length < longest:
            raise ValueError(
                f"max_length={args.max_length} would cut sequences of up to {longest} tokens, whose scores are of all their "
                f"tokens: set max_length=None, or score them again with data.max_length={args.max_length}"
            )
        return dataset.select_columns([*_IDS, *_SCORES])

    def _precompute_ref_logps(self: Any, dataset: Any, name: str, _batch_size: int) -> Any:
        if name == "train" and self.check_pairs:
            self._must_agree([dataset[row] for row in range(min(self.check_pairs, len(dataset)))])
        return dataset

    def _must_agree(self: Any, pairs: list[dict[str, Any]]) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            warnings.warn("stored reference scores are not compared with a model that is sharded", stacklevel=2)
            return
        batch = {name: values.to(self.accelerator.device) for name, values in self.data_collator(pairs).items()}
        training = self.model.training
        self.model.eval()
        of_policy = self.compute_ref_log_probs(self.model, batch)
        self.model.train(training)
        for side, score, sums in zip(("chosen", "rejected"), _SCORES, of_policy, strict=True):
            tokens = sum(len(pair[f"{side}_ids"]) for pair in pairs)
            off = sum(abs(float(ours) - pair[score]) for ours, pair in zip(sums, pairs, strict=True)) / tokens
            if not off <= _TOLERANCE:
                raise ValueError(
                    f"the policy's {side} log-probabilities differ from the stored reference's by {off:.3f} nats per token: it is "
                    "not the model that was scored. If it should not be, set check_pairs = 0"
                )


class StoredReferenceTrainer(StoredReference, DPOTrainer):
    """TRL's DPOTrainer on stored reference scores."""


def _longest(rows: Any) -> int:
    prompts, *responses = [rows[name].combine_chunks().value_lengths().to_numpy() for name in _IDS]
    return max(int((prompts + lengths).max()) for lengths in responses)
