"""From a model's name in the configuration to a local directory in Hugging Face layout, and from there to objects.

Three kinds of names: a local directory, a Hub id (with a revision), and `embedded:<name>`, a model that comes with the
set-up as a Python package. Weights must be safetensors: no pickle is ever opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from pipeline.artifacts import durable
from pipeline.config.experiment import ReferenceConfig
from pipeline.errors import ConfigError, first_line
from pipeline.models.configuration import read_json
from pipeline.models.directories import EMBEDDED, MODELS, embedded_model, must_be_as_made, publish
from pipeline.models.identity import TOKENIZER_FILES, adapter_digests, behaviour_digest
from pipeline.models.load import ModelSpec, load_causal_lm
from pipeline.models.weights import loaded_files, unloaded_files

VIEWS = Path("data/cache/views")
# what is fetched of a model on the Hub
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py"]


def locate(spec: ModelSpec) -> Path:
    """The local directory of a model, made or fetched if need be.

    Raises ConfigError if the name leads nowhere or the directory holds no safetensors weights.
    """
    name = spec.model
    on_the_hub = not name.startswith("embedded:") and not Path(name).expanduser().is_dir()
    # with trust_remote_code a revision says which code is trusted, wherever it lies
    if spec.revision and not on_the_hub and not spec.trust_remote_code:
        raise ConfigError(
            f"model {name!r} lies here and has no revisions, so revision {spec.revision!r} would change nothing: remove it, "
            "or name a model of the Hub"
        )
    if name.startswith("embedded:"):
        directory = embedded_model(name.removeprefix("embedded:"))
    elif Path(name).expanduser().is_dir():
        directory = Path(name).expanduser()
    elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        directory = _from_hub(name, spec.revision)
    else:
        raise ConfigError(
            f"model {name!r}: no such directory, and not of a Hub id's form owner/name; "
            f"the embedded models are {', '.join(f'embedded:{embedded}' for embedded in EMBEDDED)}"
        )
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"model {name!r}: {directory} has no config.json, so it is not a model in Hugging Face layout"
        )
    if not loaded_files(directory):
        raise ConfigError(
            f"model {name!r}: {directory} holds no *.safetensors. Other weight files are pickles and are not opened: "
            "convert them with transformers' save_pretrained on a machine where you trust them"
        )
    if spec.trust_remote_code:
        _must_bring_its_code(directory)
    return directory


def at_hand(spec: ModelSpec) -> Path | None:
    """The directory of a model that needs no making or fetching; None if it, or a part of it, does."""
    name = spec.model
    if name.startswith("embedded:"):
        directory: Path | None = MODELS / name.removeprefix("embedded:")
    elif Path(name).expanduser().is_dir():
        directory = Path(name).expanduser()
    else:
        directory = _in_hub_cache(name, spec.revision)
    return directory if directory is not None and _is_whole(directory) else None


def _is_whole(directory: Path) -> bool:
    try:
        return (directory / "config.json").is_file() and bool(loaded_files(directory))
    except ConfigError:
        return False  # some of its files, as a cache holds them that was asked for the tokenizer alone


class ReferencePaths(NamedTuple):
    """Where a reference's bytes lie: the model, its adapter, and what an engine loads."""

    base: Path
    adapter: Path | None
    merged: Path


def locate_reference(reference: ReferenceConfig) -> ReferencePaths:
    """Directories of the configured reference, its adapter merged if there is one."""
    base = locate(reference)
    adapter = Path(reference.adapter).expanduser() if reference.adapter else None
    return ReferencePaths(base, adapter, merge_adapter(base, reference, adapter) if adapter else base)


def merge_adapter(base: Path, spec: ModelSpec, adapter: Path) -> Path:
    """A directory with `adapter` merged into `base`, made once for these bytes. ConfigError if it is no adapter."""
    if not all((adapter / name).is_file() for name in ("adapter_config.json", "adapter_model.safetensors")):
        raise ConfigError(f"{adapter} is no PEFT adapter: adapter_config.json and adapter_model.safetensors are wanted")
    made_of = [behaviour_digest(base), adapter_digests(adapter), _read_text(adapter / "adapter_config.json")]
    made_by = [importlib.metadata.version(name) for name in ("peft", "transformers")]
    directory = MODELS / f"merged-{hashlib.sha256(json.dumps([made_of, made_by]).encode()).hexdigest()[:16]}"
    if directory.is_dir():
        must_be_as_made(directory)
        return directory
    import torch
    from peft import PeftModel

    temporary = durable.temporary_beside(directory)
    try:
        with durable.explaining_disk(directory):
            # merged in float32, so that nothing of a small adapter is rounded away
            model = PeftModel.from_pretrained(load_causal_lm(base, spec, torch.float32), adapter).merge_and_unload()
            model.save_pretrained(temporary)
            copy_tokenizer(base, temporary)
            publish(temporary, directory, {"base": str(base), "adapter": str(adapter)})
    except (ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(f"the adapter {adapter} does not fit {base} ({first_line(error)})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def only_loaded(directory: Path) -> Path:
    """The directory, or one of links to all of its files but safetensors that are not loaded: vLLM would read those too."""
    left_out = set(unloaded_files(directory))
    if not left_out:
        return directory
    name = hashlib.sha256(json.dumps([str(directory.resolve()), sorted(map(str, left_out))]).encode()).hexdigest()[:16]
    view = VIEWS / name
    view.mkdir(parents=True, exist_ok=True)
    for link in view.iterdir():
        link.unlink(missing_ok=True)
    for file in directory.iterdir():
        if file not in left_out:
            with contextlib.suppress(FileExistsError):
                (view / file.name).symlink_to(file.resolve())
    return view


def copy_tokenizer(base: Path, directory: Path) -> None:
    """Copy the tokenizer's files byte for byte: saving them anew may change them."""
    for pattern in TOKENIZER_FILES:
        for file in base.glob(pattern):
            copy = directory / file.relative_to(base)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


# --- where models come from


def _in_hub_cache(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    for cache in (None, *_home_cache()):
        try:
            found = snapshot_download(
                name, revision=revision, allow_patterns=_PATTERNS, local_files_only=True, cache_dir=cache
            )
        except (LocalEntryNotFoundError, HFValidationError):
            continue
        if _is_whole(Path(found)):
            return Path(found)
    return None


def _home_cache() -> list[Path]:
    """The Hub's cache in the home directory, if another one is used here: what other tools fetched is read, nothing is written."""
    from huggingface_hub import constants

    try:
        home = Path.home() / ".cache/huggingface/hub"
    except RuntimeError:
        return []  # a user without a home, as in some containers
    return [home] if home.is_dir() and home != Path(constants.HF_HUB_CACHE) else []


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    # a commit is the same wherever it lies; a branch, or none, is looked up anew if there is a network
    if revision and re.fullmatch("[0-9a-f]{40}", revision) and (cached := _in_hub_cache(name, revision)):
        return cached
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_PATTERNS))
    except Exception as error:  # noqa: BLE001  # the errors of the HTTP library below are none of huggingface_hub's
        if cached := _in_hub_cache(name, revision):
            return cached
        at_revision = f" at revision {revision}" if revision else ""
        raise ConfigError(
            f"model {name!r}{at_revision} is not in the local Hub cache and cannot be fetched ({first_line(error)}). "
            "Without a network give a local directory instead; with one, check the name, the revision, your rights "
            "(HF_TOKEN) and HF_HUB_OFFLINE"
        ) from None


def _must_bring_its_code(directory: Path) -> None:
    """Raise ConfigError if the model's code comes from another repository, which no revision pins and no identity knows."""
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        if not (directory / name).is_file():
            continue
        named = read_json(directory / name).get("auto_map")
        for value in named.values() if isinstance(named, dict) else [named]:
            for code in value if isinstance(value, list) else [value]:
                if isinstance(code, str) and "--" in code:
                    raise ConfigError(
                        f"{directory / name} takes code from {code.partition('--')[0]}, at whatever revision is there today: copy "
                        f"that code beside the model and write {code.partition('--')[2]!r} in auto_map, if you trust it"
                    )


def _read_text(file: Path) -> str:
    return file.read_text(encoding="utf-8")
