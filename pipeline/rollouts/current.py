"""Whether rollouts.parquet is what a configuration asks for, and what differs if it is not. Starts no engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.artifacts.runs import Run
from pipeline.artifacts.schemas import ROLLOUTS
from pipeline.artifacts.tables import in_format_of, read_about
from pipeline.config.experiment import Config
from pipeline.config.files import differing_fields, digest
from pipeline.errors import ConfigError
from pipeline.models.identity import identify_model
from pipeline.models.load import Named, chat_template_digest, load_tokenizer, vocabulary_digest
from pipeline.models.locate import at_hand
from pipeline.pairs.splits import source_digests
from pipeline.rollouts.prompts import judge_of_texts
from pipeline.rollouts.rewards import judge_key
from pipeline.rollouts.values import why_other_critic

_OF_GENERATE = {"max_tokens", "fixed_length", "dtype", "engine_args"}
_OF_REFERENCE = {"model", "revision", "adapter", "engine", "imported_by", "dtype"}


def inputs_of(config: Config) -> dict[str, Any]:
    """Every configuration field that decides rollouts.parquet, by section, but the critic, whose values not every training reads;
    the bytes of data and models are digested apart.
    """
    judge = judge_of_texts(config, config.rollout.judge)
    return {
        "data": config.data.deciding(),
        "reference": config.reference.model_dump(mode="json", include=_OF_REFERENCE),
        "policy": config.policy.model_dump(mode="json", include={"model", "revision"}),
        "generate": config.generate.model_dump(mode="json", include=_OF_GENERATE),
        "rollout": config.rollout.model_dump(mode="json", exclude={"prompts_per_shard", "judge", "critic"}),
        "judge": {"name": judge.name, "label": judge.label},
    }


def inputs_digest(config: Config) -> str:
    """Digest of `inputs_of`."""
    return digest(inputs_of(config))


def ensure_rollouts(config: Config, run: Run) -> None:
    """Raise ConfigError, with what differs, unless rollouts.parquet was made from this configuration and what it names now, and has
    the configured critic's values if the training reads any.
    """
    path, train = run.rollouts, config.train
    if why := why_not_current(path, config):
        raise ConfigError(f"{path} {why}: run 'refscore rollout' with the same configuration and run first")
    if train.objective == "policy_gradient" and train.policy_gradient.reads_values:
        _must_have_values(path, config)


def _must_have_values(path: Path, config: Config) -> None:
    about = read_about(path)
    if config.rollout.critic is None:
        raise ConfigError(
            f"train.policy_gradient.advantage=gae, which variant {config.train.policy_gradient.variant} has here, reads a critic's "
            "values: train one on these samples (train.objective=value, in a run of its own), set rollout.critic=run:<that run>, "
            "and run 'refscore rollout' again, which makes the values alone"
        )
    if why := why_other_critic(about.get("critic"), config, str(about.get("dtype"))):
        raise ConfigError(
            f"{path} {why}: run 'refscore rollout' with the same configuration and run again, which makes the values alone"
        )


def why_not_current(path: Path, config: Config) -> str | None:
    """Why the file at `path` is not what `config` asks for; None if it is.

    What is not at hand is taken to be unchanged: a source that is gone or is no file, a model that would have to be fetched. A
    critic that is trained may begin as another model than the policy that wrote the samples.
    """
    about = read_about(path)
    if not path.is_file():
        return "does not exist"
    if not about.get("inputs") or not in_format_of(path, ROLLOUTS):
        return "was not written by this refscore"
    made_from, asked = _with_later_fields(about["inputs"], config), inputs_of(config)
    if config.train.objective == "value":
        asked["policy"] = made_from["policy"]
    if differ := differing_fields(made_from, asked):
        return f"was made with other settings ({'; '.join(differ)})"
    for name, found in source_digests(config.data).items():
        if found not in (None, about["source_digests"].get(name)):
            return f"was made from other data ({name} has changed)"
    return _other_models(about, config)


def _with_later_fields(inputs: dict[str, Any], config: Config) -> dict[str, Any]:
    """Inputs of a file from before some fields were there: those had what is their default now."""
    filled = dict(inputs)
    for section, fields in inputs_of(config).items():
        declared = getattr(type(getattr(config, section)), "model_fields", {})
        known = {name: declared[name].get_default(call_default_factory=True) for name in fields if name in declared}
        filled[section] = {**known, **inputs.get(section, {})}
    return filled


def _other_models(about: dict[str, Any], config: Config) -> str | None:
    policy, reference = at_hand(config.policy), at_hand(config.reference)
    if (
        policy
        and config.train.objective != "value"
        and identify_model(policy, trusts_code=config.policy.trust_remote_code).digest != about["policy"]["model"]
    ):
        return f"was written by another policy than policy.model {config.policy.model!r} is now"
    adapter = Path(config.reference.adapter).expanduser() if config.reference.adapter else None
    if reference and (adapter is None or adapter.is_dir()):
        of_reference = identify_model(reference, adapter, trusts_code=config.reference.trust_remote_code).digest
        tokenizer = load_tokenizer(reference, config.reference)
        if of_reference != about["model"]:
            return f"was scored under another reference than reference.model {config.reference.model!r} is now"
        if [vocabulary_digest(tokenizer), chat_template_digest(tokenizer)] != [about["vocabulary"], about["template"]]:
            return "was made with another tokenizer or chat template than the reference has now"
    settings = judge_of_texts(config, config.rollout.judge)
    is_here = settings.kind not in ("reward_model", "llm") or settings.remote or at_hand(Named(settings.argument))
    if is_here and judge_key(settings, config.judge) != about["judge_key"]:
        return f"was rewarded by judge {settings.shown} with other settings, or by what it was before"
    return None
