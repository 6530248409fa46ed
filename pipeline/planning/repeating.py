"""What a run was made from against what is here now, and how far its repetition came to the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.artifacts.digests import files_sha256
from pipeline.artifacts.runs import Run, finished_stages, git_commit, read_json, versions
from pipeline.artifacts.schemas import METRICS, PAIRS, RESPONSES, SAMPLES
from pipeline.artifacts.states import about_reference
from pipeline.artifacts.tables import read_about, read_table
from pipeline.config.experiment import Config
from pipeline.config.judges import IMPLICIT
from pipeline.errors import first_line
from pipeline.hardware import describe
from pipeline.models.identity import identify_model
from pipeline.models.load import ModelSpec, chat_template_digest, load_tokenizer, vocabulary_digest
from pipeline.models.locate import at_hand
from pipeline.pairs.splits import source_digests

# of the machine and of the moment, not of the training
_OF_THE_MOMENT = ("step_seconds", "tokens_per_second", "peak_memory_gib")
# columns that are compared
# the table's name of a row, and the scores in it
_SCORED = {
    "pairs.parquet": (PAIRS, ["pair_id", "ref_chosen_logps", "ref_rejected_logps"]),
    "responses.parquet": (RESPONSES, ["group_id", "ref_response_logps"]),
}
_SAMPLE = ["prompt_id", "sample", "model", "response_ids"]
# judges that are nothing but this code
_OF_THE_CODE = (IMPLICIT, "rule")


@dataclass
class Changed:
    """Since a run was made: inputs that are others now, so that nothing can be repeated; what else differs; what is not known."""

    inputs: list[str] = field(default_factory=list)
    surroundings: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def changed_since(run: Run, config: Config) -> Changed:
    """Data and models by digest, versions, hardware and commit, against what the run's provenance says.

    Raises DataError if a table of the run cannot be read, so that nothing could be compared with it.
    """
    _tables_must_be_whole(run)
    provenance, about, changed = read_json(run.provenance), read_about(run.scored), Changed()
    then = about.get("source_digests", {})
    for name, now in source_digests(config.data).items():
        if now is None:
            changed.unknown.append(f"data {name}: what it holds now is known only once it is loaded")
        elif now != then.get(name):
            changed.inputs.append(f"data {name}: its bytes are not those that the run read")
    done = finished_stages(run)
    _model(changed, "reference", config.reference, about_reference(run))
    # training reads the policy's texts as pairs.parquet has them: no template
    policy = {"model": done.get("train", {}).get("policy"), "vocabulary": about.get("vocabulary")}
    _model(changed, "policy", config.policy, policy if policy["model"] else {})
    if "eval" in done:
        changed.unknown += _not_looked_at(config)
    before, here = provenance.get("versions", {}), versions()
    for name in sorted(before.keys() | here.keys()):
        if before.get(name) != here.get(name):
            changed.surroundings.append(f"{name}: {before.get(name, 'none')} then, {here.get(name, 'none')} now")
    hardware = provenance.get("hardware", {})
    for name, now in describe().items():
        if hardware.get(name) != now:
            changed.surroundings.append(f"{name}: {hardware.get(name, 'unknown')} then, {now} now")
    if provenance.get("git_commit") != (commit := git_commit()):
        changed.surroundings.append(f"refscore's commit: {provenance.get('git_commit')} then, {commit} now")
    return changed


def same_outcome(first: Run, second: Run) -> list[str]:
    """Sentences: whether two runs have the same scores, steps, weights and responses, and by how much they are apart."""
    sentences = []
    if first.scored.is_file() and second.scored.is_file() and first.scored.name == second.scored.name:
        sentences.append(_scores(first, second))
    if first.metrics.is_file() and second.metrics.is_file():
        sentences.append(_steps(first, second))
    trained = ((first.model, second.model), (first.adapter, second.adapter))
    sentences += [_weights(*both) for both in trained if all(directory.is_dir() for directory in both)]
    if first.samples.is_file() and second.samples.is_file():
        tables = [_read(run.samples, SAMPLES, _SAMPLE) for run in (first, second)]
        joined = tables[0].join(tables[1], on=_SAMPLE[:-1], how="inner")
        same = joined.filter(pl.col("response_ids") == pl.col("response_ids_right")).height
        sentences.append(f"responses {same} of {max(one.height for one in tables)} are the same")
    return sentences


def _tables_must_be_whole(run: Run) -> None:
    for path, schema, columns in (
        (run.scored, *_SCORED[run.scored.name]),
        (run.metrics, METRICS, METRICS.names),
        (run.samples, SAMPLES, _SAMPLE),
    ):
        if path == run.scored or path.exists():
            read_table(path, schema, columns)


def _model(changed: Changed, name: str, spec: ModelSpec, then: Mapping[str, Any]) -> None:
    """Compare what `then` says of model, vocabulary and template with what is here; it may say of some only."""
    if not then.get("model"):
        return
    base = at_hand(spec)
    given = getattr(spec, "adapter", None)
    adapter = Path(given).expanduser() if given else None
    if base is None or (adapter and not adapter.is_dir()):
        changed.unknown.append(f"{name} {spec.model}: it is not here, and would be fetched")
        return
    tokenizer = load_tokenizer(base, spec)
    now = {
        "model": (
            identify_model(base, adapter, trusts_code=spec.trust_remote_code).digest,
            "weights or its configuration are not those",
        ),
        "vocabulary": (vocabulary_digest(tokenizer), "vocabulary is not that"),
        "template": (chat_template_digest(tokenizer), "chat template is not that"),
    }
    for part, (digest, words) in now.items():
        if then.get(part, digest) != digest:
            changed.inputs.append(f"{name} {spec.model}: its {words} of the run")


def _not_looked_at(config: Config) -> list[str]:
    """What stage three reads beside the run's own model, of which no digest is compared."""
    models = {"generate.baseline": config.generate.baseline} if config.generate.baseline else {}
    models |= {f"generate.models.{name}": model for name, model in config.generate.models.items()}
    said = [f"{name} {model}: whether it is the model of the run is not looked at" for name, model in models.items()]
    for judge in config.judge:
        names = judge.members if judge.kind == "panel" else [judge.name]
        if any(name.partition(":")[0] not in _OF_THE_CODE for name in names):
            what = "the model or the file that it asks"
            if judge.rubric:
                what += f", and {judge.rubric},"
            said.append(f"judge {judge.shown}: whether {what} is that of the run is not looked at")
    return said


def _scores(first: Run, second: Run) -> str:
    schema, (name, *scores) = _SCORED[first.scored.name]
    # responses of a group stand in one order
    place = pl.int_range(pl.len()).over(name).alias("place")
    both = [_read(run.scored, schema, [name, *scores]).with_columns(place) for run in (first, second)]
    joined = both[0].join(both[1], on=[name, "place"], how="inner")
    said = f"scores    {joined.height} of {max(one.height for one in both)} {first.scored.stem} in both"
    if not joined.height:
        return f"{said}: nothing to compare"
    apart = [_Apart.of(joined, column) for column in scores]
    if not any(one.compared for one in apart):
        return f"{said}, without scores"
    said += f", at most {max(one.most for one in apart):.3g} nats apart{_uncompared(apart)}"
    again = finished_stages(second).get("precompute", {}).get("scored")
    return f"{said}; read from the store, not scored again" if again == 0 else said


def _steps(first: Run, second: Run) -> str:
    both = [_read(run.metrics, METRICS, METRICS.names).drop(_OF_THE_MOMENT) for run in (first, second)]
    joined = both[0].join(both[1], on="step", how="inner")
    if not joined.height:
        return f"steps     no common step, of {both[0].height} and {both[1].height}"
    apart = {name: _Apart.of(joined, name) for name in both[0].columns if name != "step"}
    worst = max(apart, key=lambda name: apart[name].most)
    of_loss = f"{apart['loss'].most:.3g}" if apart["loss"].compared else "nothing that can be compared"
    return (
        f"steps     {joined.height} of {max(one.height for one in both)} in both; losses at most {of_loss} apart, "
        f"{worst} {apart[worst].most:.3g}{_uncompared(apart.values())}"
    )


def _weights(first: Path, second: Path) -> str:
    """Whether the files that are loaded from two directories, whole or in shards, hold the same bytes."""
    try:
        files = [sorted(directory.glob("*.safetensors")) for directory in (first, second)]
        digests = [{file.name: digest for file, digest in files_sha256(of_one).items()} for of_one in files]
    except OSError as error:
        return f"weights   cannot be read ({first_line(error)})"
    names = sorted(digests[0].keys() | digests[1].keys())
    if not names:
        return f"weights   none in {first} and {second}"
    shown = f"{first.name}/{names[0]}" if len(names) == 1 else f"{first.name}, {len(names)} files"
    return f"weights   {'the same bytes' if digests[0] == digests[1] else 'other bytes'} ({shown})"


@dataclass(frozen=True)
class _Apart:
    """A column against the other table's: the largest difference, over how many rows, and rows of which one has no number."""

    most: float
    compared: int
    one_sided: int

    @staticmethod
    def of(joined: pl.DataFrame, name: str) -> _Apart:
        ours, theirs = (joined[column].cast(pl.Float64).to_numpy() for column in (name, f"{name}_right"))
        nothing = [np.isnan(ours), np.isnan(theirs)]
        both = ~(nothing[0] | nothing[1])
        # two infinities of one sign are the same
        differs = both & (ours != theirs)
        most = float(np.abs(ours[differs] - theirs[differs]).max(initial=0.0))
        return _Apart(most, int(both.sum()), int((nothing[0] != nothing[1]).sum()))


def _uncompared(columns: Iterable[_Apart]) -> str:
    one_sided = sum(one.one_sided for one in columns)
    return f"; {one_sided} values not comparable, as one run has no number there" if one_sided else ""


def _read(path: Path, schema: pa.Schema, columns: list[str]) -> pl.DataFrame:
    return pl.DataFrame(read_table(path, schema, columns))
