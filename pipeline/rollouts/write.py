"""The whole of `refscore rollout`: the policy's samples, rewards, scores, values, rollouts.parquet; one model in memory at once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.artifacts import durable
from pipeline.artifacts.runs import Run, record
from pipeline.artifacts.schemas import COMPUTED_BY
from pipeline.artifacts.writer import one_writer
from pipeline.config.experiment import Config, GenerateConfig, ReferenceConfig
from pipeline.config.files import digest
from pipeline.config.losses import reference_free
from pipeline.engines.reference import OpenedReference, open_for_new
from pipeline.engines.vllm.generator import settled
from pipeline.errors import CheckError, ConfigError
from pipeline.judges.judging import Prompt
from pipeline.judges.open import JudgeContext, open_judge
from pipeline.models.configuration import position_limit
from pipeline.models.identity import behaviour_digest
from pipeline.models.load import chat_template_digest, vocabulary_digest
from pipeline.precompute.pairs_file import ensure_pairs
from pipeline.progress import SILENT, Listener
from pipeline.rollouts.costs import Costs
from pipeline.rollouts.current import inputs_digest, inputs_of
from pipeline.rollouts.prompts import judge_of_texts, read_prompts
from pipeline.rollouts.rewards import Rewarder, asks_a_model, judge_key, make_rewards
from pipeline.rollouts.samples import make_samples, shards_of
from pipeline.rollouts.scores import Scores
from pipeline.rollouts.table import Counts, Rows
from pipeline.rollouts.values import make_values, open_critic


@dataclass(frozen=True)
class Rollouts:
    """What rollouts.parquet holds: its counts, the mean reward, the mean log-ratio of the policy to the reference per sample."""

    counts: Counts
    mean_reward: float
    kl: float


@one_writer
def write_rollouts(config: Config, run: Run, listener: Listener = SILENT) -> Rollouts:
    """Sample the training prompts with the policy, reward and score the samples, and read a critic's values of them if one is
    configured; write rollouts.parquet.

    What any run made under the same settings is used again. Raises ConfigError if models, judge or prompts do not fit together,
    CheckError if nothing is left to learn from, RefscoreError if the store cannot be written.
    """
    # said now, not after the first samples
    durable.make_directory(run.rollout_shards)
    reference, policy = open_both(config, listener)
    settings = judge_of_texts(config, config.rollout.judge)
    made_by = (vocabulary_digest(reference.tokenizer), chat_template_digest(reference.tokenizer))
    # opened before anything is generated: what is wrong with it is said at once
    judge = open_judge(settings, JudgeContext(run.verdicts, config.judge, made_by, listener))
    if judge.reward is None and config.rollout.samples < 2:
        raise ConfigError(
            f"judge {judge.name} plays the samples of a prompt against each other, and rollout.samples=1 makes one of each: take "
            "two or more, or a judge of single responses (rollout.judge)"
        )
    rewarder = Rewarder(judge, judge_key(settings, config.judge), asks_a_model(settings))
    found, digests = read_prompts(config.data, reference.tokenizer)
    prompts = found[: config.rollout.prompts]
    generate = on_policy(config, reference.numerics.dtype)
    fitting = fitting_prompts(prompts, policy, generate)
    critic = open_critic(config, reference.numerics.dtype, vocabulary_digest(reference.tokenizer))
    if critic is not None:
        critic.must_read(max(len(one.ids) for one in fitting) + generate.max_tokens)
    listener.say(
        f"prompts   {len(fitting)} of the training split, {generate.samples} samples each of {config.policy.model}, rewarded by "
        f"{judge.name}"
    )
    shards = shards_of(behaviour_digest(policy.paths.merged), fitting, generate, config.rollout.prompts_per_shard)
    costs = Costs(run.rollout_shards / "costs.jsonl")

    make_samples(shards, policy, generate, run, costs, listener)
    make_rewards(shards, rewarder, run, costs, listener)
    of_policy = Scores(policy, shards, run)
    same = policy.identity.reference_id == reference.identity.reference_id
    of_policy.make("the policy, which is the reference" if same else "the policy", costs, listener)
    of_reference = of_policy if same else Scores(reference, shards, run)
    if not same:
        of_reference.make("the reference", costs, listener)

    if critic is not None:
        make_values(shards, critic, run, costs, listener)

    rows = Rows(run, shards, rewarder, of_policy, of_reference, critic)
    rows.count()
    counts = rows.counts
    counts.prompts, counts.too_long = len(prompts), len(prompts) - len(fitting)
    counts.without_samples += counts.too_long
    _must_teach(rows)
    both = [of_policy] if same else [of_policy, of_reference]
    computed_by: Counter[str] = Counter()
    for scores in both:
        computed_by.update(scores.computed_by())
    about = _about(config, digests, rows, generate, dict(computed_by))
    rows.write(run.rollouts, about)
    for scores in both:
        scores.register()

    mean, kl = float(np.mean(rows.rewards)), float(np.mean(rows.kl))
    spread = float(np.std(rows.rewards))
    failed = f", {counts.judge_failed} without one" if counts.judge_failed else ""
    listener.say(f"rewards   mean {mean:.4f}, standard deviation {spread:.4f}, of {len(rows.rewards)} samples{failed}")
    listener.say(f"scores    log-ratio of policy to reference {kl:.4f} nats per sample, {counts.cut_off} cut off")
    for line in counts.lines():
        listener.say(line)
    record(
        run,
        config,
        "rollout",
        reference_id=of_reference.reference_id,
        key=about["key"],
        judge=judge.name,
        counts=counts.described(),
        computed_by=dict(computed_by),
        mean_reward=mean,
        kl=kl,
        **_costs(costs, rows),
        digests={"data": digests, "reference_weights": reference.identity.model.weights_digest},
    )
    if reference_free(config.train):
        # stage three has its held-out prompts from there
        ensure_pairs(config, run, listener)
    return Rollouts(counts, mean, kl)


def on_policy(config: Config, dtype: str) -> GenerateConfig:
    """How rollouts are sampled: from the policy's own distribution, in the dtype that scores if none is set."""
    chosen = {"temperature": 1.0, "top_p": 1.0, "samples": config.rollout.samples, "seed": config.rollout.seed}
    return settled(config.generate, dtype).model_copy(update=chosen)


def policy_as_reference(reference: ReferenceConfig, config: Config) -> ReferenceConfig:
    """The policy in the reference's place: its own weights, the reference's engine, numerics and store."""
    policy = config.policy
    stands = {"model": policy.model, "revision": policy.revision, "trust_remote_code": policy.trust_remote_code}
    return reference.model_copy(update={**stands, "adapter": None})


def open_both(config: Config, listener: Listener = SILENT) -> tuple[OpenedReference, OpenedReference]:
    """The reference and the policy. Raises ConfigError if they have not one vocabulary."""
    reference = open_for_new(config.reference, listener)
    policy = open_for_new(policy_as_reference(reference.config, config))
    if vocabulary_digest(policy.tokenizer) != vocabulary_digest(reference.tokenizer):
        raise ConfigError(
            f"policy.model {config.policy.model!r} has another vocabulary than reference.model {config.reference.model!r}: "
            "a token id does not mean the same to both, so they cannot be compared"
        )
    return reference, policy


def fitting_prompts(prompts: list[Prompt], policy: OpenedReference, settings: GenerateConfig) -> list[Prompt]:
    """The prompts that leave room for a response. Raises ConfigError if none does."""
    limit = position_limit(policy.paths.base)
    # one position more is what the engine is started with
    fitting = [one for one in prompts if limit is None or len(one.ids) + settings.max_tokens + 1 <= limit]
    if not fitting:
        raise ConfigError(
            f"none of {len(prompts)} prompts leaves room for a response: the shortest has {min(len(one.ids) for one in prompts)} "
            f"tokens, generate.max_tokens is {settings.max_tokens}, and the policy reads {limit}: lower generate.max_tokens"
        )
    return fitting


def _must_teach(rows: Rows) -> None:
    """Raise CheckError if no sample is left, or none has a reward."""
    counts, judge = rows.counts, rows.rewarder.judge.name
    if not counts.samples:
        raise CheckError(
            f"none of {counts.generated} samples is left ({counts.empty} without a token, {counts.not_finite} whose scores are not "
            "finite): look at the policy, or try another reference.dtype"
        )
    if not rows.rewards:
        raise CheckError(
            f"judge {judge} gave none of {counts.samples} samples a reward that is a number: {rows.run.verdicts} may say why. The "
            "samples are kept; the same command asks again, or set rollout.judge"
        )


def _about(
    config: Config, digests: dict[str, str], rows: Rows, settings_of: GenerateConfig, computed_by: dict[str, int]
) -> dict[str, Any]:
    """What rollouts.parquet says of itself: what it was made from, and how much there is of it. `computed_by`: of how many
    sequences adopted references computed the scores.
    """
    policy, reference, rewarder = rows.policy.model, rows.reference.model, rows.rewarder
    made_from = {
        "policy_id": policy.identity.reference_id,
        "reference_id": reference.identity.reference_id,
        "judge_key": rewarder.key,
    }
    return {
        "key": digest(
            made_from,
            {"samples": [[shard.key, shard.responses(rows.run)] for shard in rows.shards]},
            rows.counts.described(),
            *([{COMPUTED_BY: computed_by}] if computed_by else []),
        ),
        **({COMPUTED_BY: computed_by} if computed_by else {}),
        "policy": {"weights_digest": policy.identity.model.weights_digest, "model": policy.identity.model.digest},
        **made_from,
        "model": reference.identity.model.digest,
        "weights_digest": reference.identity.model.weights_digest,
        "dtype": reference.numerics.dtype,
        "vocabulary": vocabulary_digest(reference.tokenizer),
        "template": chat_template_digest(reference.tokenizer),
        "judge": rewarder.judge.name,
        "critic": rows.critic.key if rows.critic else None,
        "samples": settings_of.samples,
        "max_tokens": settings_of.max_tokens,
        "seed": settings_of.seed,
        "source_digests": digests,
        "inputs_digest": inputs_digest(config),
        "inputs": inputs_of(config),
        "counts": rows.counts.described(),
    }


def _costs(costs: Costs, rows: Rows) -> dict[str, dict[str, float]]:
    """Seconds and tokens of each part, of all times this run worked on it."""
    scored = {*rows.policy.costs_of(), *rows.reference.costs_of()}
    valued = {rows.critic.values_of(shard) for shard in rows.shards} if rows.critic else set[str]()
    return {
        "generate": costs.of("generate", {shard.key for shard in rows.shards}),
        "reward": costs.of("reward", {rows.rewarder.rewards_of(shard) for shard in rows.shards}),
        "score": costs.of("score", scored),
        "value": costs.of("value", valued),
    }
