"""What a training learns from: which model, read how, by which loss. A new objective is a file and a row here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from pipeline.config.experiment import Config
from pipeline.config.losses import data_of
from pipeline.config.training import TrainConfig
from pipeline.training.objectives.measured import Found
from pipeline.training.objectives.policy_gradient import PolicyGradient
from pipeline.training.objectives.preference import Preference
from pipeline.training.objectives.responses import Labelled, Lists
from pipeline.training.objectives.reward_model import RewardModel
from pipeline.training.objectives.value_model import ValueModel
from pipeline.training.parallel.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Objective(Protocol):
    """Everything in which objectives differ. The pass of `forward_of` is what `measured` takes as `forward`.

    `unit`: what a step counts. `adapter_task` is PEFT's name of the task, `pipeline_tag` the Hub's, `in_words` how the model card
    says it.
    """

    unit: str
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

    def parts(self, examples: Any, rows: Sequence[int]) -> tuple[Any, Sequence[int]]:
        """The examples that forward passes take, and which of them the step of `rows` is; mostly the same."""
        ...

    def whole(self, examples: Any, rows: Sequence[int], train: TrainConfig) -> Any:
        """What is known of the step of `rows` before any forward pass, for `measured`: normalisers, advantages."""
        ...

    def before(
        self,
        forward: Any,
        examples: Any,
        rows: Sequence[int],
        train: TrainConfig,
        whole: Any,
        world: World,
        *,
        learning: bool,
    ) -> Any:
        """What is known of the step once examples were read without gradients, if the objective needs that, in place of `whole`.

        `learning`: the step trains, it is no evaluation. All processes of `world` must call it.
        """
        ...

    def measured(self, forward: Any, examples: Any, group: Sequence[int], train: TrainConfig, whole: Any) -> Found:
        """Losses and metrics of the examples of `group`, which are some of the step that `whole` is known of."""
        ...


PREFERENCE, REWARD = Preference(), RewardModel()
_OBJECTIVES: dict[str, Objective] = {
    "preference": PREFERENCE,
    "reward": REWARD,
    "policy_gradient": PolicyGradient(),
    "value": ValueModel(),
}


# the preference objective on data that is no pairs
_OF_DATA: dict[str, Objective] = {"responses": Labelled(), "lists": Lists()}


def objective_of(train: TrainConfig) -> Objective:
    """The objective that a `train` section names."""
    return _OF_DATA.get(data_of(train)) or _OBJECTIVES[train.objective]
