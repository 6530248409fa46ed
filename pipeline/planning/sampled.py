"""What `refscore rollout` would make for a configuration, and what of it is there already. Starts no engine."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from pipeline.artifacts.runs import Run
from pipeline.config.experiment import Config
from pipeline.engines.protocol import Request
from pipeline.engines.reference import OpenedReference
from pipeline.models.identity import behaviour_digest
from pipeline.rollouts.prompts import read_prompts
from pipeline.rollouts.samples import Shard, kept_by, shards_of
from pipeline.rollouts.scores import Scores
from pipeline.rollouts.write import fitting_prompts, on_policy, open_both


@dataclass(frozen=True)
class Sampled:
    """`prompts` has the tokens of each prompt that is sampled `each` times, up to `max_tokens`; `too_long` prompts are not.

    `made` samples are there. `models` score them: the policy, and the reference if it is another; `to_score` are the sequences that
    the store lacks, of all models, of `tokens_to_score` tokens at most, `responses_to_score` of them in responses; `adopted` are
    those that it would have from adopted references, by their ids.
    """

    policy: OpenedReference
    prompts: np.ndarray
    too_long: int
    each: int
    max_tokens: int
    made: int
    models: int
    to_score: int
    tokens_to_score: int
    responses_to_score: int
    adopted: dict[str, int]

    @property
    def samples(self) -> int:
        """All samples."""
        return len(self.prompts) * self.each

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that there can be."""
        return int(self.prompts.max()) + self.max_tokens

    @property
    def missing(self) -> int:
        """Samples that are not there."""
        return self.samples - self.made


def foresee(config: Config) -> Sampled:
    """What a rollout of `config` would do. Raises what `write_rollouts` raises before it generates."""
    reference, policy = open_both(config)
    found, _ = read_prompts(config.data, reference.tokenizer)
    prompts = found[: config.rollout.prompts]
    settings = on_policy(config, reference.numerics.dtype)
    fitting = fitting_prompts(prompts, policy, settings)
    shards = shards_of(behaviour_digest(policy.paths.merged), fitting, settings, config.rollout.prompts_per_shard)
    kept: dict[Run, list[Shard]] = {}
    new: list[int] = []
    for shard in shards:
        if run := kept_by(shard):
            kept.setdefault(run, []).append(shard)
        else:
            new += [len(prompt.ids) for prompt in shard.prompts]
    same = policy.identity.reference_id == reference.identity.reference_id
    models = [policy] if same else [policy, reference]
    lacking: list[Request] = []
    adopted: Counter[str] = Counter()
    for model in models:
        for run, of_run in kept.items():
            requests, held = Scores(model, of_run, run).foreseen()
            lacking += requests
            adopted.update(held)
    to_make = len(new) * settings.samples
    return Sampled(
        policy=policy,
        prompts=np.asarray([len(prompt.ids) for prompt in fitting]),
        too_long=len(prompts) - len(fitting),
        each=settings.samples,
        max_tokens=settings.max_tokens,
        made=len(fitting) * settings.samples - to_make,
        models=len(models),
        to_score=len(models) * to_make + len(lacking),
        tokens_to_score=len(models) * settings.samples * sum(length + settings.max_tokens for length in new)
        + sum(map(len, lacking)),
        responses_to_score=len(models) * to_make * settings.max_tokens
        + sum(len(request.response_ids) for request in lacking),
        adopted=dict(adopted),
    )
