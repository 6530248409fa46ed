"""The reward model: a policy's layers with one score for a whole response, read off its last token.

Saved as AutoModelForSequenceClassification with one label, which transformers and vLLM load. transformers reads the score
at the last token that is not `pad_token_id`, so that token must be none that ends a response.

Shapes: N branches, H hidden size.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.config.experiment import Config
from pipeline.config.training import PolicyConfig, TrainConfig
from pipeline.errors import ConfigError, first_line
from pipeline.forward.logps import Hidden, hidden_states_of
from pipeline.forward.transfer import to_device
from pipeline.forward.trees import Tree, merge
from pipeline.training.inputs.pairs import Pairs
from pipeline.training.objectives.common import OfPairs
from pipeline.training.objectives.losses import LossTerms, bradley_terry_loss
from pipeline.training.objectives.measured import Found, measured_pairs
from pipeline.training.objectives.preference import margins_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rewards:
    """A function from trees to scores: for each tree and branch a float32 scalar."""

    hidden: Hidden
    head: torch.nn.Module

    def __call__(self, trees: Sequence[Tree]) -> list[list[torch.Tensor]]:
        """Scores of every branch of every tree."""
        merged, places = merge(trees)
        # the forward pass drops a branch's last token, as it predicts nothing: one token is appended so that the last is read
        longer = _with_one_more(merged)
        hidden_NH = self.hidden.of(longer)
        ends = list(itertools.accumulate(len(branch) for tree in longer for branch in tree.branches))
        last = hidden_NH[to_device(np.array(ends) - 1, hidden_NH.device)]
        with torch.autocast(last.device.type, enabled=False):
            scores = self.head(last.float())[:, 0]
        return [[scores[place] for place in tree] for tree in places]

    def tokens(self, trees: Sequence[Tree]) -> int:
        """Tokens that the model reads for `trees`, filling of batches included."""
        return self.hidden.tokens(_with_one_more(merge(trees)[0]))


def _with_one_more(trees: Sequence[Tree]) -> list[Tree]:
    return [Tree(tree.trunk, tuple((*branch, 0) for branch in tree.branches)) for tree in trees]


class Classifier:
    """A one-label sequence classifier over the layers of a policy."""

    adapter_task = "SEQ_CLS"
    pipeline_tag = "text-classification"

    def load(
        self,
        base: Path,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        ends: set[int],
        precision: torch.dtype,  # noqa: ARG002  # the protocol's
        **options: Any,
    ) -> PreTrainedModel:
        """See `Objective.load`."""
        return load_reward_model(base, config.policy, tokenizer, ends, **options)

    def load_again(self, directory: Path, config: Config, like: PreTrainedModel, **options: Any) -> PreTrainedModel:
        """See `Objective.load_again`."""
        model: PreTrainedModel = type(like).from_pretrained(
            directory,
            num_labels=1,
            pad_token_id=like.config.pad_token_id,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=config.policy.trust_remote_code,
            **options,
        )
        return model


class RewardModel(OfPairs, Classifier):
    """See `pipeline.training.objectives.objective.Objective`."""

    in_words = "as a reward model"

    def forward_of(
        self,
        model: PreTrainedModel,
        layout: str,
        precision: torch.dtype,
        device: torch.device | None = None,
        *,
        whole: bool = True,  # noqa: ARG002  # nothing is tried
    ) -> Rewards:
        """See `Objective.forward_of`."""
        return rewards_of(model, layout, precision, device)

    def measured(
        self, forward: Rewards, examples: Pairs, group: Sequence[int], train: TrainConfig, whole: float
    ) -> Found:
        """See `Objective.measured`."""
        terms, _ = self.terms(forward, examples, group, train, whole)
        return Found(terms.losses, measured_pairs(terms, None))

    def terms(
        self,
        forward: Rewards,
        pairs: Pairs,
        group: Sequence[int],
        train: TrainConfig,
        mean_tokens: float,  # noqa: ARG002  # the objectives'
    ) -> tuple[LossTerms, None]:
        """Loss terms of the pairs of `group`, and no logps. `mean_tokens`: of the chosen side of the whole step."""
        scores = forward([pairs.trees[row] for row in group])
        chosen, rejected = (torch.stack([tree[side] for tree in scores]) for side in (0, 1))
        margins = (
            to_device(margins_of(pairs, group), chosen.device) * train.margin_scale if train.margin_scale else None
        )
        return bradley_terry_loss(chosen, rejected, margins), None


def rewards_of(
    model: PreTrainedModel, layout: str, precision: torch.dtype, device: torch.device | None = None
) -> Rewards:
    """The scoring function of a one-label sequence classifier."""
    return Rewards(hidden_states_of(model, layout, precision, device), model.score)


def load_reward_model(
    directory: Path, spec: PolicyConfig, tokenizer: PreTrainedTokenizerBase, ends: set[int], **options: Any
) -> PreTrainedModel:
    """The model at `directory` as a one-label sequence classifier; a new head is drawn as by Stiennon et al. 2020 (2009.01325).

    `ends` are the tokens that end responses. Raises ConfigError if the architecture has no such classifier.
    """
    from transformers import AutoModelForSequenceClassification

    try:
        # transformers draws a head too
        with torch.random.fork_rng(devices=[]):
            model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
                directory,
                num_labels=1,
                pad_token_id=pad_token_id(tokenizer, ends),
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=spec.trust_remote_code,
                local_files_only=True,
                **options,
            )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"model {spec.model!r}: {directory} cannot be loaded as a sequence classifier ({first_line(error)})"
        ) from None
    if not isinstance(getattr(model, "score", None), torch.nn.Linear) or model.score.out_features != 1:
        raise ConfigError(f"{type(model).__name__} has no linear score of the last token: no reward model can be made")
    if not has_head(directory):
        # also if the other weights are not read yet
        head = torch.empty(model.score.weight.shape, dtype=model.score.weight.dtype)
        torch.nn.init.normal_(head, std=1 / (model.score.in_features + 1) ** 0.5)
        model.score.weight = torch.nn.Parameter(
            head.to(device="cpu" if model.score.weight.is_meta else model.score.weight.device)
        )
    return model


def pad_token_id(tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> int:
    """A token that ends no response, to fill batches with. ConfigError if there is none among the special tokens."""
    special_tokens = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id)
    for token in (*special_tokens, *tokenizer.all_special_ids, *sorted(getattr(tokenizer, "added_tokens_decoder", {}))):
        if token is not None and token not in ends:
            return int(token)
    raise ConfigError(
        "every special token of the tokenizer ends responses, so none is left to fill batches with: "
        "a reward model could not tell where a response ends"
    )


def align_padding(directory: Path, tokenizer: PreTrainedTokenizerBase, pad: int) -> None:
    """Make the tokenizer saved in `directory` fill batches with `pad`, as the model's configuration says."""
    path = directory / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["pad_token"] = tokenizer.convert_ids_to_tokens(pad)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def has_head(directory: Path) -> bool:
    """Whether the model at `directory` gives scores already."""
    architectures = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    return any(name.endswith("ForSequenceClassification") for name in architectures)
