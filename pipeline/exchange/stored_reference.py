"""TRL's DPOTrainer on reference log-probabilities that are stored: no reference model in memory, none of them computed again.

This file needs trl and nothing of refscore; `refscore export --format trl` puts a copy of it beside the data:

    from datasets import load_dataset
    from stored_reference import StoredReferenceTrainer
    from trl import DPOConfig

    data = load_dataset("DIR")
    args = DPOConfig(precompute_ref_log_probs=True, max_length=None)
    StoredReferenceTrainer("my/model", args=args, train_dataset=data["train"], eval_dataset=data.get("test")).train()

`StoredReference` does the same for a trainer derived from TRL's: class MyTrainer(StoredReference, TheirDPOTrainer).
"""

from __future__ import annotations

import warnings
from typing import Any, cast

import trl
from trl import DPOTrainer  # type: ignore[attr-defined]  # it is a lazy module

_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_SCORES = ("ref_chosen_logps", "ref_rejected_logps")
# nats per token that the arithmetic of bfloat16 may move a sum by; another model, or another template, moves it by tenths
_TOLERANCE = 0.02
# what is overridden or called below; a release without one would compute the reference again, or nothing at all
for _name in ("_prepare_dataset", "_precompute_ref_logps", "compute_ref_log_probs"):
    if not hasattr(DPOTrainer, _name):
        raise ImportError(
            f"the DPOTrainer of trl {trl.__version__} has no {_name}: install trl 1.13, which this was written for"
        )


class StoredReference:
    """Put before a DPO trainer of TRL: it takes token ids and reference scores from the data as they are.

    `check_pairs`: pairs of each data set, spread over it, that the policy is compared with before training, which must then
    start as the reference; 0 if it starts from other weights.
    """

    check_pairs = 8
    _in_use = False

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Train; refused if the trainer behind this class took its data and its reference in a way of its own."""
        if not self._in_use:
            raise ValueError(
                f"{type(self).__name__} does not prepare its data as TRL's DPOTrainer does, so no stored score is used: it would "
                "compute a reference of its own"
            )
        return cast("Any", super()).train(*args, **kwargs)

    def _prepare_dataset(self, dataset: Any, _processing_class: Any, args: Any, dataset_name: str) -> Any:
        if not hasattr(dataset, "__len__"):
            raise ValueError(f"the {dataset_name} data is streamed: load it without streaming")
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
        longest = max((_longest(rows, dataset_name) for rows in dataset.with_format("arrow").iter(8192)), default=0)
        if args.max_length is not None and args.max_length < longest:
            raise ValueError(
                f"max_length={args.max_length} would cut sequences of up to {longest} tokens, whose scores are of all their "
                f"tokens: set max_length=None, or score them again with data.max_length={args.max_length}"
            )
        return dataset.select_columns([*_IDS, *_SCORES])

    def _precompute_ref_logps(self: Any, dataset: Any, name: str, _batch_size: int) -> Any:
        if self.ref_model is not None:
            raise ValueError("leave ref_model out: the scores are stored, and a model would stay in memory unused")
        self._in_use = True
        if number := min(self.check_pairs, len(dataset)):
            last = len(dataset) - 1
            self._must_agree(name, [dataset[row * last // max(1, number - 1)] for row in range(number)])
        return dataset

    def _must_agree(self: Any, name: str, pairs: list[dict[str, Any]]) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            warnings.warn("stored reference scores are not compared with a model that is sharded", stacklevel=2)
            return
        batch = {key: values.to(self.accelerator.device) for key, values in self.data_collator(pairs).items()}
        training = self.model.training
        self.model.eval()
        of_policy = self.compute_ref_log_probs(self.model, batch)
        self.model.train(training)
        for side, score, sums in zip(("chosen", "rejected"), _SCORES, of_policy, strict=True):
            tokens = sum(len(pair[f"{side}_ids"]) for pair in pairs)
            off = sum(abs(float(ours) - pair[score]) for ours, pair in zip(sums, pairs, strict=True)) / tokens
            if not off <= _TOLERANCE:
                raise ValueError(
                    f"the policy's {side} log-probabilities differ from the stored reference's by {off:.3f} nats per token in the "
                    f"{name} data: it is not the model that was scored. If it should not be, set check_pairs = 0"
                )


class StoredReferenceTrainer(StoredReference, DPOTrainer):
    """TRL's DPOTrainer on stored reference scores."""


def _longest(rows: Any, dataset_name: str) -> int:
    for name in _IDS + _SCORES:
        if rows[name].null_count or (name in _SCORES and not _finite(rows[name])):
            raise ValueError(
                f"{name} of the {dataset_name} data holds null, or what is no finite number: export it with refscore export "
                "--format trl, whose pairs all have scores"
            )
    prompts, *responses = [rows[name].combine_chunks().value_lengths().to_numpy() for name in _IDS]
    return max(int((prompts + lengths).max()) for lengths in responses)


def _finite(scores: Any) -> bool:
    return str(scores.type) in ("double", "float") and bool((abs(scores.to_numpy()) < float("inf")).all())
