"""What a training learns from its pairs: which model, read how, by which loss. A new objective is a file and a row here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from pipeline.config.experiment import Config
from pipeline.config.training import TrainConfig
from pipeline.training.examples import Pairs
from pipeline.training.objectives.losses import LossTerms, PairLogps
from pipeline.training.objectives.preference import Preference
from pipeline.training.objectives.reward_model import RewardModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Objective(Protocol):
    """Everything in which objectives differ. The pass of `forward_of` is what `terms` takes as `forward`.

    `adapter_task` is PEFT's name of the task, `pipeline_tag` the Hub's, `in_words` how the model card says it.
    """

    adapter_task: str
    pipeline_tag: str
    in_words: str

    def load(
        self,
        base: Path,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        ends: set[int],
        precision: torch.dtype,
        **options: Any,
    ) -> PreTrainedModel:
        """The model to train, from the directory `base`; `ends` are the tokens that end responses."""
        ...

    def load_again(self, directory: Path, config: Config, like: PreTrainedModel, **options: Any) -> PreTrainedModel:
        """The model of a directory in float32: what was saved, or the base of an adapter. `like` is the trained one."""
        ...

    def forward_of(
        self,
        model: PreTrainedModel,
        layout: str,
        precision: torch.dtype,
        device: torch.device | None = None,
        *,
        whole: bool = True,
    ) -> Any:
        """The model's pass over trees on `device`, or where the model lies; its method `tokens(trees)` counts what it reads.

        `whole`: all weights are there, so that the pass can be tried.
        """
        ...

    def terms(
        self, forward: Any, pairs: Pairs, group: Sequence[int], train: TrainConfig, mean_tokens: float
    ) -> tuple[LossTerms, PairLogps | None]:
        """Loss terms of the pairs of `group`, and their logps if there are any.

        `mean_tokens`: of the chosen side of the whole step.
        """
        ...


_OBJECTIVES: dict[str, Objective] = {"preference": Preference(), "reward": RewardModel()}


def objective_of(train: TrainConfig) -> Objective:
    """The objective that a `train` section names."""
    return _OBJECTIVES[train.objective]
