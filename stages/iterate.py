"""`refscore iterate`: train, let the policy write what it learns from next, train again; then compare all rounds.

With pairs: round 1 trains on the configured data. Every later round starts from the policy of the one before, which answers the
training prompts; the judge `generate.pair_judge` makes pairs of the answers. With train.objective=policy_gradient every round
begins with samples of its policy for the training prompts, rewarded and scored; with advantages by values (variant=ppo) a critic
is trained on them then, in a run NAME-r1-critic, beginning as the last round's. `generate.next_reference` says what a later round's
reference is. Runs are called NAME-r1, NAME-r2, ...; the last one's report compares the reference and all rounds.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from pipeline.artifacts.runs import Run, open_run
from pipeline.config.experiment import Config
from pipeline.errors import ConfigError
from pipeline.evaluation.candidates import policy_of
from pipeline.progress import duration
from pipeline.rollouts.rounds import critic_of, name_of, write_rounds
from pipeline.rollouts.values import place_of
from pipeline.store.identity import IMPORTED
from stages import console
from stages.steps import step


def main(config: Config, path: Path, name: str, overrides: list[str], rounds: int) -> None:
    """Every round: precompute, train, pairs, or rollout and train; then one evaluation of all. Raises ConfigError if new pairs
    would need scores and those are imported, or if what is trained writes nothing.
    """
    started = time.monotonic()
    if config.train.of_scores:
        raise ConfigError(
            f"train.objective={config.train.objective} trains a model that writes no responses, so no round can follow: "
            "'refscore train' does"
        )
    on_samples = config.train.objective == "policy_gradient"
    if config.reference.engine == IMPORTED and rounds > 1 and not on_samples:
        raise ConfigError(
            f"later rounds make new pairs, and scores imported by {config.reference.imported_by!r} are of others: set "
            "reference.engine=vllm and no reference.imported_by, or --rounds 1"
        )
    runs = [open_run(f"{name}-r{number}") for number in range(1, rounds + 1)]
    settings = list(overrides)
    for number, this in enumerate(runs):
        if number:
            settings = [*overrides, *_next(config, runs[number - 1])]
        if on_samples and config.train.policy_gradient.reads_values:
            settings = _with_critic(config, path, this, runs[number - 1] if number else None, settings)
        else:
            step("rollout" if on_samples else "precompute", path, this.name, settings)
        step("train", path, this.name, settings)
        if number < rounds - 1 and not on_samples:
            step("pairs", path, this.name, settings)
    if on_samples:
        # the report shows them
        write_rounds(runs)
    # every round against the reference of the first, whatever the last one trained against
    models = {name_of(number, rounds): f"run:{earlier.name}" for number, earlier in enumerate(runs[:-1], start=1)}
    first = json.dumps(config.generate.baseline or _first_reference(config))
    step(
        "eval", path, runs[-1].name, [*settings, f"generate.models={json.dumps(models)}", f"generate.baseline={first}"]
    )
    if on_samples:
        write_rounds(runs)
    console.say(f"\nrounds    {', '.join(run.name for run in runs)} in {duration(time.monotonic() - started)}")
    console.say(f"report    {runs[-1].report}: policy is round {rounds}")


def _with_critic(config: Config, path: Path, this: Run, last: Run | None, settings: list[str]) -> list[str]:
    """Samples, a critic of them, and its values of them; returns the settings of a training that reads these.

    The critic begins as the last round's; in the first round as `rollout.critic` if it names one, else as the policy.
    """
    critic, plain = critic_of(this), [*settings, "rollout.critic=null"]
    step("rollout", path, this.name, plain)
    # the same samples, which are copied
    step("rollout", path, critic.name, plain)
    begins = str(critic_of(last).model) if last else config.rollout.critic and place_of(config.rollout.critic)
    of_critic = ["train.objective=value", f"train.learning_rate={config.train.policy_gradient.critic_learning_rate}"]
    of_critic += [f"policy.model={json.dumps(begins)}", "policy.revision=null"] if begins else []
    of_critic += ["policy.dtype=float32"] if config.policy.dtype != "float32" else []
    of_critic += ["policy.lora.merge=true"] if config.policy.lora else []
    step("train", path, critic.name, [*plain, *of_critic])
    settings = [*settings, f"rollout.critic={json.dumps(f'run:{critic.name}')}"]
    step("rollout", path, this.name, settings)
    return settings


def _next(config: Config, last: Run) -> list[str]:
    """What differs in the next round."""
    policy = json.dumps(str(policy_of(config, last).merged()))
    settings = [f"policy.model={policy}", "policy.revision=null"]
    if config.train.objective != "policy_gradient":
        settings += [
            f"data.path={json.dumps(str(last.new_pairs))}",
            f"data.eval_path={json.dumps(str(last.held_out))}",
            "data.columns={}",
            "data.max_rows=null",
            "data.split=train",
            "data.revision=null",
        ]
    if config.generate.next_reference == "previous":
        settings += [f"reference.model={policy}", "reference.revision=null", "reference.adapter=null"]
    return settings


def _first_reference(config: Config) -> str:
    from pipeline.models.locate import locate_reference

    reference = config.reference
    return str(locate_reference(reference).merged) if reference.adapter or reference.revision else reference.model
