"""What objectives have in common: the model that is trained, and the examples that steps are made of.

An objective is one of each: `CausalPolicy` or a classifier, on pairs, on examples as they are, or on the samples of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.config.experiment import Config
from pipeline.config.training import TrainConfig
from pipeline.forward.logps import Forward, forward_of
from pipeline.models.load import load_causal_lm
from pipeline.training.inputs.pairs import Pairs
from pipeline.training.inputs.rollouts import Rollouts, Samples
from pipeline.training.objectives.measured import mean_chosen_tokens
from pipeline.training.parallel.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class CausalPolicy:
    """A causal language model, read by the log-probabilities of responses."""

    adapter_task = "CAUSAL_LM"
    pipeline_tag = "text-generation"

    def load(
        self,
        base: Path,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,  # noqa: ARG002  # the protocol's
        ends: set[int],  # noqa: ARG002  # the protocol's
        precision: torch.dtype,
        **options: Any,
    ) -> PreTrainedModel:
        """See `Objective.load`."""
        # frozen weights need no more digits than they were saved with
        frozen = config.policy.lora and precision == torch.bfloat16
        learning = getattr(torch, config.policy.dtype)
        return load_causal_lm(base, config.policy, "auto" if frozen else learning, **options)

    def load_again(self, directory: Path, config: Config, like: PreTrainedModel, **options: Any) -> PreTrainedModel:  # noqa: ARG002
        """See `Objective.load_again`."""
        return load_causal_lm(directory, config.policy, torch.float32, **options)

    def forward_of(
        self,
        model: PreTrainedModel,
        layout: str,
        precision: torch.dtype,
        device: torch.device | None = None,
        *,
        whole: bool = True,
    ) -> Forward:
        """See `Objective.forward_of`."""
        return forward_of(model, layout, precision, device, whole=whole)


class AtOnce:
    """Every example learns by what is known before any forward pass."""

    def before(
        self,
        forward: Any,  # noqa: ARG002  # the protocol's
        examples: Any,  # noqa: ARG002
        rows: Sequence[int],  # noqa: ARG002
        train: TrainConfig,  # noqa: ARG002
        whole: Any,
        world: World,  # noqa: ARG002
        *,
        learning: bool,  # noqa: ARG002
    ) -> Any:
        """See `Objective.before`: nothing."""
        return whole


class OfPairs(AtOnce):
    """A step is made of pairs."""

    unit = "pair"

    def parts(self, examples: Pairs, rows: Sequence[int]) -> tuple[Pairs, Sequence[int]]:
        """See `Objective.parts`: the pairs themselves."""
        return examples, rows

    def whole(self, examples: Pairs, rows: Sequence[int], train: TrainConfig) -> float:  # noqa: ARG002  # the protocol's
        """See `Objective.whole`: the mean length of the chosen responses."""
        return mean_chosen_tokens(examples, rows)


class OfSamples(AtOnce):
    """A step is made of prompts, a forward pass of as many of their samples as fit."""

    unit = "prompt"

    def parts(self, examples: Rollouts, rows: Sequence[int]) -> tuple[Samples, list[int]]:
        """See `Objective.parts`: the samples of the step's prompts."""
        return examples.one_by_one, [number for row in rows for number in examples.of(row)]
