"""What pairs.parquet says of what it was made from, and whether that is still so."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifacts.tables import read_about
from pipeline.config.experiment import Config, ReferenceConfig
from pipeline.config.files import digest
from pipeline.models.identity import identify_model
from pipeline.models.load import chat_template_digest, load_tokenizer, vocabulary_digest
from pipeline.models.locate import at_hand
from pipeline.pairs.stream import source_digests

if TYPE_CHECKING:
    from pipeline.precompute.plan import Plan


def inputs_digest(config: Config) -> str:
    """Digest of every configuration field that decides pairs.parquet; the data files' bytes are digested apart."""
    reference = config.reference.model_dump(mode="json", include={"model", "revision", "adapter", "engine", "dtype"})
    return digest(config.data, reference)


def is_current(path: Path, config: Config, *, scored: bool = True) -> bool:
    """Whether `path` was made from this configuration and from what its data files and its reference hold now, with scores
    if asked.

    What is not at hand is taken to be unchanged: a source that is gone or is no file (a Hub data set), a reference that
    would have to be fetched.
    """
    about = read_about(path)
    if not about or about.get("inputs_digest") != inputs_digest(config):
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
        "vocabulary": plan.vocabulary,
        "template": plan.template,
        "scored": scored,
    }
