"""What a run was made from against what is here now, and how far its repetition came to the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.artifacts.digests import file_sha256
from pipeline.artifacts.runs import Run, git_commit, read_json, versions
from pipeline.artifacts.tables import read_about
from pipeline.config.experiment import Config
from pipeline.hardware import describe
from pipeline.models.identity import identify_model
from pipeline.models.load import ModelSpec
from pipeline.models.locate import at_hand
from pipeline.pairs.splits import source_digests

# of the machine and of the moment, not of the training
_OF_THE_MOMENT = ("step_seconds", "tokens_per_second", "peak_memory_gib")


@dataclass
class Changed:
    """Since a run was made: inputs that are others now, so that nothing can be repeated; what else differs; what is not known."""

    inputs: list[str] = field(default_factory=list)
    surroundings: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def changed_since(run: Run, config: Config) -> Changed:
    """Data and models by digest, versions, hardware and commit, against what the run's provenance says."""
    provenance, about, changed = read_json(run.provenance), read_about(run.pairs), Changed()
    then = about.get("source_digests", {})
    for name, now in source_digests(config.data).items():
        if now is None:
            changed.unknown.append(f"data {name}: what it holds now is known only once it is loaded")
        elif now != then.get(name):
            changed.inputs.append(f"data {name}: its bytes are not those that the run read")
    _model(changed, "reference", config.reference, about.get("model"))
    policy = provenance.get("stages", {}).get("train", {}).get("policy")
    _model(changed, "policy", config.policy, policy)
    for name, now in versions().items():
        before = provenance.get("versions", {}).get(name)
        if before != now:
            changed.surroundings.append(f"{name}: {before or 'none'} then, {now} now")
    hardware = provenance.get("hardware", {})
    for name, here in describe().items():
        if hardware.get(name) != here:
            changed.surroundings.append(f"{name}: {hardware.get(name, 'unknown')} then, {here} now")
    if provenance.get("git_commit") != (commit := git_commit()):
        changed.surroundings.append(f"refscore's commit: {provenance.get('git_commit')} then, {commit} now")
    return changed


def same_outcome(first: Run, second: Run) -> list[str]:
    """Sentences: whether two runs have the same scores, steps, weights and responses, and by how much they are apart."""
    sentences = []
    if first.pairs.is_file() and second.pairs.is_file():
        sentences.append(_scores(first.pairs, second.pairs))
    if first.metrics.is_file() and second.metrics.is_file():
        sentences.append(_steps(first.metrics, second.metrics))
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        files = [run.directory / name for run in (first, second)]
        if all(file.is_file() for file in files):
            same = len({file_sha256(file) for file in files}) == 1
            sentences.append(f"weights   {'the same bytes' if same else 'other bytes'} ({name})")
    if first.samples.is_file() and second.samples.is_file():
        keys = ["prompt_id", "sample", "model"]
        both = [pl.read_parquet(run.samples, columns=[*keys, "response_ids"]) for run in (first, second)]
        joined = both[0].join(both[1], on=keys, how="inner")
        same_responses = joined.filter(pl.col("response_ids") == pl.col("response_ids_right")).height
        sentences.append(f"responses {same_responses} of {both[0].height} are the same")
    return sentences


def _model(changed: Changed, name: str, spec: ModelSpec, then: Any) -> None:
    if then is None:
        return
    base = at_hand(spec)
    if base is None:
        changed.unknown.append(f"{name} {spec.model}: it is not here, and would be fetched")
        return
    adapter = getattr(spec, "adapter", None)
    now = identify_model(base, Path(adapter).expanduser() if adapter else None, trusts_code=spec.trust_remote_code)
    if now.digest != then:
        changed.inputs.append(f"{name} {spec.model}: its weights or its configuration are not those of the run")


def _scores(first: Path, second: Path) -> str:
    columns = ["pair_id", "ref_chosen_logps", "ref_rejected_logps"]
    both = [pl.read_parquet(path, columns=columns) for path in (first, second)]
    joined = both[0].join(both[1], on="pair_id", how="inner")
    apart = max(_apart(joined, name) for name in columns[1:])
    return f"scores    {joined.height} of {both[0].height} pairs in both, at most {apart:.3g} nats apart"


def _steps(first: Path, second: Path) -> str:
    both = [pl.read_parquet(path).drop(_OF_THE_MOMENT) for path in (first, second)]
    joined = both[0].join(both[1], on="step", how="inner")
    apart = {name: _apart(joined, name) for name in both[0].columns if name != "step"}
    worst = max(apart, key=lambda name: apart[name])
    return (
        f"steps     {joined.height} of {both[0].height} in both; losses at most {apart['loss']:.3g} apart, "
        f"{worst} {apart[worst]:.3g}"
    )


def _apart(joined: pl.DataFrame, name: str) -> float:
    """The largest difference of a column from the other table's; 0 if no row has both."""
    differences = np.abs(joined[name].to_numpy() - joined[f"{name}_right"].to_numpy())
    return float(np.nanmax(differences, initial=0.0))
