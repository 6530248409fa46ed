"""pairs.parquet, or responses.parquet for a loss that learns from these: written from a plan and the store, what it says of what
it was made from, and whether that is still so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.artifacts.runs import Run, record
from pipeline.artifacts.schemas import COMPUTED_BY, DROPPED, IMPORTED_BY, PAIRS, RESPONSES, ROUNDING
from pipeline.artifacts.tables import in_format_of, read_about, read_table, write_table
from pipeline.artifacts.writer import one_writer
from pipeline.config.experiment import Config, ReferenceConfig, without_reference
from pipeline.config.files import digest
from pipeline.config.losses import data_of, margins, mismatched, reference_free
from pipeline.errors import ConfigError, DataError
from pipeline.models.control_tokens import control_tokens
from pipeline.models.identity import identify_model
from pipeline.models.load import chat_template_digest, load_tokenizer, vocabulary_digest
from pipeline.models.locate import at_hand
from pipeline.pairs.splits import source_digests
from pipeline.precompute.join import dropped_with, rows_left_out, write_joined
from pipeline.precompute.plan import Plan, Planning, make_plan, serve_adopted
from pipeline.progress import SILENT, Listener
from pipeline.store.fixed_point import FIXED_POINT, LARGEST_ERROR

# data.max_length where a configuration gave none, up to version 0.1
_ONCE_DEFAULT_LENGTH = 1024
# what a table is made for that does not say so
_AS_PAIRS: dict[str, object] = {"data": "pairs", "mismatched": False}


def table_of(run: Run, config: Config) -> Path:
    """The table of what the run's training reads: pairs.parquet or responses.parquet; of its prompts, the one that is there."""
    if config.train.on_samples:
        return run.scored
    return run.pairs if data_of(config.train) == "pairs" else run.responses


def inputs_digest(config: Config) -> str:
    """Digest of every configuration field that decides pairs.parquet; the data files' bytes are digested apart."""
    return _digest_with(config.data.deciding(), config.reference)


def _digest_with(data: dict[str, Any], reference: ReferenceConfig) -> str:
    # a field that was added later counts if it says something
    data = {name: value for name, value in data.items() if name != "lists" or value != "best_worst"}
    fields = {"model", "revision", "adapter", "engine", "dtype", *(["imported_by"] if reference.imported_by else [])}
    return digest(data, reference.model_dump(mode="json", include=fields))


def _asked_for(about: dict[str, Any], config: Config, path: Path) -> bool:
    """Whether pairs.parquet was made from a configuration that says what `config` does, be it that of an earlier version.

    One without `special_tokens` parsed them; one without `max_length` meant 1024. Both say the same where no text names a control
    token, and where that length left no pair out.
    """
    made_from, data = about.get("inputs_digest"), config.data.deciding()
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
    made_for: dict[str, object] = {"data": data_of(config.train), "mismatched": mismatched(config.train)}
    if made_for["data"] == "prompts" and about.get("data", "pairs") == "pairs":
        made_for = _AS_PAIRS  # what the same data says, with its prompts
    schema = PAIRS if made_for["data"] == "pairs" else RESPONSES
    if not about or not in_format_of(path, schema) or not _asked_for(about, config, path):
        return False
    if scored and not about.get("scored", True):
        return False
    if any(about.get(name, otherwise) != made_for[name] for name, otherwise in _AS_PAIRS.items()):
        return False
    # a version that did not read margins wrote none
    if margins(config.train) and not about.get("margins"):
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
    """What pairs.parquet, or responses.parquet, says of itself: enough to tell later whether it still fits its inputs."""
    made_for = {"data": plan.data, "mismatched": bool(plan.mismatched)}
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
        **({} if made_for == _AS_PAIRS else made_for),
        **({"margins": plan.pairs.margins} if plan.pairs.margins else {}),
        **({IMPORTED_BY: plan.identity.numerics.imported_by} if plan.imported and scored else {}),
        **({ROUNDING: LARGEST_ERROR} if plan.identity.numerics.logps == FIXED_POINT and scored else {}),
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
    plan: Plan,
    config: Config,
    run: Run,
    *,
    scored: bool = True,
    newly: int | None = None,
    quarantined: Mapping[bytes, str] | None = None,
    asked: Config | None = None,
) -> None:
    """Join scores from the store and write pairs.parquet or responses.parquet, dropped.parquet, config.yaml and provenance.json.

    A run has one of the two tables: the other, of an earlier configuration, is removed. `newly`: how many of its sequences were
    scored for it; by default those that the plan lacked. `quarantined`: what `score` returned; its pairs are dropped as not_finite.
    `asked`: what the run was asked for, if that is not `config`, in which its policy may stand for the reference. Raises CheckError
    if a score is not in the store.
    """
    about = about_pairs(plan, config, scored=scored)
    table, other = (run.pairs, run.responses) if plan.pairs.of_pairs else (run.responses, run.pairs)
    about["inputs_digest"] = _digest_in_use(about, config, table)
    lookup = plan.store.lookup(plan.keys) if scored else None
    # whose scores stand for the reference's, and of how many sequences
    computed_by = {by: len(held) for by, held in lookup.held_from_adopted().items()} if lookup else {}
    about |= {COMPUTED_BY: computed_by} if computed_by else {}
    left_out = rows_left_out(plan, quarantined or {})
    write_table(run.dropped, dropped_with(plan, left_out))
    write_joined(table, plan, about, scored=scored, left_out=left_out, lookup=lookup)
    other.unlink(missing_ok=True)
    if scored:
        plan.store.register(run.directory)
    record(
        run,
        asked or config,
        "precompute",
        reference_id=plan.identity.reference_id,
        reference=plan.identity.described(),
        sequences=plan.sequences,
        scored=(len(plan.missing) - len(quarantined or {}) if newly is None else newly) if scored else 0,
        computed_by=computed_by,
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
    listener.say(f"nothing to score: {_why_nothing(config)}; no engine is started")
    plan = make_plan(without_reference(config))
    for line in [*plan.lines(scored=False), *remarks(plan)]:
        listener.say(line)
    if not plan_only:
        write_pairs(plan, without_reference(config), run, scored=False, asked=config)
        table = table_of(run, config)
        listener.say(f"{table.stem:9} {table}")


def _why_nothing(config: Config) -> str:
    train = config.train
    if train.objective not in ("preference", "reward"):
        return "the training learns from samples, which 'refscore rollout' makes and scores"
    reader = "the reward model" if train.objective == "reward" else " + ".join(train.loss_type)
    return f"{reader} compares nothing with the reference"


def ensure_pairs(config: Config, run: Run, listener: Listener = SILENT) -> None:
    """Make pairs.parquet, or responses.parquet, fit the configuration, from the store alone. Raises ConfigError if scores are
    missing there, DataError if they were to be imported.
    """
    if reference_free(config.train):
        table = table_of(run, config)
        current = is_current(table, config) or is_current(table, without_reference(config), scored=False)
        if not current:
            write_unscored(config, run, listener)
        return
    if is_current(table_of(run, config), config):
        return
    planning = Planning(config)
    planning.register(run.directory)
    plan = planning.plan()
    serve_adopted(plan)
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
