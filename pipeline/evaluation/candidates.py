"""The models that stage three samples: the policy, the reference, and others by the names the configuration gives them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifacts.runs import RUNS, Run
from pipeline.config.experiment import Config
from pipeline.engines.reference import OpenedReference
from pipeline.errors import ConfigError, first_line
from pipeline.models.identity import adapter_digests, behaviour_digest
from pipeline.models.load import ModelSpec, Named, load_tokenizer, vocabulary_digest
from pipeline.models.locate import locate, merge_adapter


@dataclass(frozen=True)
class Candidate:
    """A model under the name it has in tables: a directory, or an adapter on one."""

    name: str
    base: Path
    spec: ModelSpec
    adapter: Path | None = None

    @property
    def described(self) -> str:
        return f"{self.adapter} on {self.base}" if self.adapter else str(self.base)

    @property
    def digest(self) -> str:
        """Digest of the weights, the adapter's included."""
        parts = [behaviour_digest(self.base), *(sorted(adapter_digests(self.adapter).items()) if self.adapter else [])]
        return json.dumps(parts)

    def merged(self) -> Path:
        """A directory that a scorer can load; made once if there is an adapter."""
        return merge_adapter(self.base, self.spec, self.adapter) if self.adapter else self.base


def candidates(config: Config, run: Run, reference: OpenedReference) -> list[Candidate]:
    """Policy, further models, reference, in that order. Raises ConfigError if one cannot be found."""
    others = [_other(name, value, config) for name, value in config.generate.models.items()]
    return [policy_of(config, run), *others, _reference(config, reference)]


def policy_of(config: Config, run: Run) -> Candidate:
    """What the run trained: its model, or the adapter on the policy's base if only that was kept."""
    if config.train.of_scores:
        used = {"reward": f"a judge, reward_model:{run.model}", "value": f"a critic, rollout.critic=run:{run.name}"}
        raise ConfigError(
            f"run {run.name!r} trains a {config.train.objective} model, which writes no responses: use it as "
            f"{used[config.train.objective]}"
        )
    return _of_run("policy", run, config)


def must_share_vocabulary(models: Sequence[Candidate], vocabulary: str | None) -> None:
    """Raise ConfigError if a model reads other token ids than the prompts were made with (a digest, if known)."""
    for candidate in models:
        if vocabulary and vocabulary_digest(load_tokenizer(candidate.base, candidate.spec)) != vocabulary:
            raise ConfigError(
                f"model {candidate.name!r} ({candidate.described}) has another vocabulary than the prompts' token ids: only "
                "models that share it can be sampled and compared here"
            )


def _reference(config: Config, reference: OpenedReference) -> Candidate:
    if config.generate.baseline is None:
        return Candidate("reference", reference.paths.merged, config.reference)
    return _other("reference", config.generate.baseline, config)


def _other(name: str, value: str, config: Config) -> Candidate:
    if value.startswith("run:"):
        return _of_run(name, Run(RUNS / value.removeprefix("run:")), config)
    directory = Path(value).expanduser()
    if (directory / "adapter_config.json").is_file():
        return _adapter(name, directory, config)
    spec = Named(value)
    return Candidate(name, locate(spec), spec)


def _of_run(name: str, run: Run, config: Config) -> Candidate:
    if (run.model / "config.json").is_file():
        return Candidate(name, run.model, config.policy)
    if (run.adapter / "adapter_config.json").is_file():
        return _adapter(name, run.adapter, config)
    raise ConfigError(f"model {name!r}: {run.model} does not exist: run 'refscore train' with the same run first")


def _adapter(name: str, directory: Path, config: Config) -> Candidate:
    try:
        content = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        recorded = str(content.get("base_model_name_or_path") or "")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{directory}: adapter_config.json cannot be read ({first_line(error)})") from None
    # the base that the adapter names, if that is found here; else the configured policy
    here = recorded.startswith("embedded:") or (Path(recorded) / "config.json").is_file()
    base = locate(Named(recorded)) if recorded and here else locate(config.policy)
    return Candidate(name, base, config.policy, directory)
