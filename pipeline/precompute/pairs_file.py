"""pairs.parquet: written from a plan and the store, what it says of what it was made from, and whether that is still so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.artifacts.runs import Run, record
from pipeline.artifacts.schemas import DROPPED, IMPORTED_BY, PAIRS
from pipeline.artifacts.tables import in_format_of, read_about, read_table, write_table
from pipeline.artifacts.writer import one_writer
from pipeline.config.experiment import Config, ReferenceConfig, without_reference
from pipeline.config.files import digest
from pipeline.config.losses import reference_free
from pipeline.engines.quarantine import pairs_left_out
from pipeline.errors import ConfigError, DataError
from pipeline.models.control_tokens import control_tokens
from pipeline.models.identity import identify_model
from pipeline.models.load import chat_template_digest, load_tokenizer, vocabulary_digest
from pipeline.models.locate import at_hand
from pipeline.pairs.splits import source_digests
from pipeline.precompute.join import dropped_with, write_joined
from pipeline.precompute.plan import Plan, make_plan
from pipeline.progress import SILENT, Listener

# data.max_length where a configuration gave none, up to version 0.1
_ONCE_DEFAULT_LENGTH = 1024


def inputs_digest(config: Config) -> str:
    """Digest of every configuration field that decides pairs.parquet; the data files' bytes are digested apart."""
    return _digest_with(config.data.model_dump(mode="json"), config.reference)


def _digest_with(data: dict[str, Any], reference: ReferenceConfig) -> str:
    fields = {"model", "revision", "adapter", "engine", "dtype", *(["imported_by"] if reference.imported_by else [])}
    return digest(data, reference.model_dump(mode="json", include=fields))


def _asked_for(about: dict[str, Any], config: Config, path: Path) -> bool:
    """Whether pairs.parquet was made from a configuration that says what `config` does, be it that of an earlier version.

    One without `special_tokens` parsed them; one without `max_length` meant 1024. Both say the same where no text names a control
    token, and where that length left no pair out.
    """
    made_from, data = about.get("inputs_digest"), config.data.model_dump(mode="json")
    if made_from == inputs_digest(config):
        return True
    earlier = {name: value for name, value in data.items() if name != "special_tokens"}
    for fields in (data, earlier):
        lengths = {data["max_length"]} | ({_ONCE_DEFAULT_LENGTH} if data["max_length"] is None else set())
        for length in lengths:
            if made_from == _digest_with(fields | {"max_length": length}, config.reference):
                as_long = length == data["max_length"] or (
                    data["too_long"] == "drop" and not _left_out_by_length(path.with_name("dropped.parquet"))
                )
                return as_long and (
                    fields is data or data["special_tokens"] == "parse" or not _names_control(path, config)
                )
    return False


def _left_out_by_length(dropped: Path) -> bool:
    try:
        rows = read_table(dropped, DROPPED, ["reason", "detail"]).to_pylist()
    except DataError:
        return True
    # what the model has no positions for is left out with either
    return any(row["reason"] == "too_long" and "data.max_length" in row["detail"] for row in rows)


def _names_control(path: Path, config: Config) -> bool:
    """Whether a text of pairs.parquet names a control token of the reference, if its tokenizer is at hand."""
    base = at_hand(config.reference)
    if base is None:
        return False
    names = control_tokens(load_tokenizer(base, config.reference)).values()
    try:
        # of any format: these columns are the same in all
        texts = pq.read_table(path, columns=["prompt", "chosen", "rejected"], page_checksum_verification=True)
    except (pa.ArrowException, OSError):
        return True
    return any(
        pc.any(pc.match_substring(texts[column], name)).as_py()
        for column in texts.column_names
        for name in names
        if name
    )


def is_current(path: Path, config: Config, *, scored: bool = True) -> bool:
    """Whether `path` was made from this configuration and from what its data files and its reference hold now, with scores
    if asked.

    What is not at hand is taken to be unchanged: a source that is gone or is no file (a Hub data set), a reference that
    would have to be fetched.
    """
    about = read_about(path)
    if not about or not in_format_of(path, PAIRS) or not _asked_for(about, config, path):
        return False
    if scored and not about.get("scored", True):
        return False
    return all(
        digest in (None, about["source_digests"].get(name)) for name, digest in source_digests(config.data).items()
    ) and _reference_is_that_of(about, config.reference)


def _reference_is_that_of(about: dict[str, Any], reference: ReferenceConfig) -> bool:
    """Whether weights, configuration, adapter and tokenizer are those that pairs.parquet was made with, if they are at hand."""
    base = at_hand(reference)
    adapter = Path(reference.adapter).expanduser() if reference.adapter else None
    if base is None or (adapter and not adapter.is_dir()):
        return True
    tokenizer = load_tokenizer(base, reference)
    # numerics do not count: an engine that was updated since makes no score untrue
    return [about.get(name) for name in ("model", "vocabulary", "template")] == [
        identify_model(base, adapter, trusts_code=reference.trust_remote_code).digest,
        vocabulary_digest(tokenizer),
        chat_template_digest(tokenizer),
    ]


def about_pairs(plan: Plan, config: Config, *, scored: bool = True) -> dict[str, object]:
    """What pairs.parquet says of itself: enough to tell later whether it still fits its inputs."""
    return {
        "reference_id": plan.identity.reference_id,
        "model": plan.identity.model.digest,
        "weights_digest": plan.identity.model.weights_digest,
        "dtype": plan.identity.numerics.dtype,
        "inputs_digest": inputs_digest(config),
        "source_digests": plan.pairs.digests,
        "judges": plan.pairs.judges,
        "vocabulary": plan.vocabulary,
        "template": plan.template,
        "scored": scored,
        **({IMPORTED_BY: plan.identity.numerics.imported_by} if plan.imported and scored else {}),
    }


def _digest_in_use(about: dict[str, object], config: Config, path: Path) -> object:
    """The inputs' digest to write at `path`: that of the file there if it was made from the same as `about` says, else its own.

    An earlier version's digest of the same inputs is another one, and trainings that were made from it name it.
    """
    before, same = read_about(path), ("source_digests", "model", "vocabulary", "template", "scored")
    if all(before.get(name, True) == about[name] for name in same) and _asked_for(before, config, path):
        return before["inputs_digest"]
    return about["inputs_digest"]


@one_writer
def write_pairs(
    plan: Plan, config: Config, run: Run, *, scored: bool = True, quarantined: Mapping[bytes, str] | None = None
) -> None:
    """Join scores from the store and write pairs.parquet, dropped.parquet, config.yaml and provenance.json.

    `quarantined`: what `score` returned; its pairs are dropped as not_finite. Raises CheckError if a score is not in the
    store.
    """
    about = about_pairs(plan, config, scored=scored)
    about["inputs_digest"] = _digest_in_use(about, config, run.pairs)
    left_out = pairs_left_out(plan.keys, quarantined or {})
    write_table(run.dropped, dropped_with(plan, left_out))
    write_joined(run.pairs, plan, about, scored=scored, left_out=left_out)
    if scored:
        plan.store.register(run.directory)
    record(
        run,
        config,
        "precompute",
        reference_id=plan.identity.reference_id,
        reference=plan.identity.described(),
        sequences=plan.sequences,
        scored=len(plan.missing) - len(quarantined or {}) if scored else 0,
        not_finite=len(left_out),
        digests={"data": plan.pairs.digests, "reference_weights": plan.identity.model.weights_digest},
    )


def write_unscored(
    config: Config,
    run: Run,
    listener: Listener = SILENT,
    *,
    plan_only: bool = False,
    remarks: Callable[[Plan], Iterable[str]] = lambda _: (),
) -> None:
    """Write the pairs of an experiment that compares with no reference: without scores, and without an engine.

    `remarks`: what else to say of the plan before it is carried out.
    """
    reader = "the reward model" if config.train.objective == "reward" else " + ".join(config.train.loss_type)
    listener.say(f"nothing to score: {reader} compares nothing with the reference; no engine is started")
    plan = make_plan(without_reference(config))
    for line in [*plan.lines(scored=False), *remarks(plan)]:
        listener.say(line)
    if not plan_only:
        write_pairs(plan, without_reference(config), run, scored=False)
        listener.say(f"pairs     {run.pairs}")


def ensure_pairs(config: Config, run: Run, listener: Listener = SILENT) -> None:
    """Make pairs.parquet fit the configuration, from the store alone. Raises ConfigError if scores are missing there,
    DataError if they were to be imported.
    """
    if reference_free(config.train):
        current = is_current(run.pairs, config) or is_current(run.pairs, without_reference(config), scored=False)
        if not current:
            write_unscored(config, run, listener)
        return
    if is_current(run.pairs, config):
        return
    plan = make_plan(config)
    if len(plan.missing) and plan.imported:
        raise DataError(plan.not_imported())
    if len(plan.missing):
        raise ConfigError(
            f"{len(plan.missing)} of {plan.sequences} sequences have no stored score for reference "
            f"{plan.identity.reference_id[:12]}: run 'refscore precompute' with the same configuration and run first"
        )
    for line in plan.lines():
        listener.say(line)
    write_pairs(plan, config, run)
