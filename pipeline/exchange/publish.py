"""A trained model to the Hugging Face Hub, with the card that was written when it was saved."""

from __future__ import annotations

import glob
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pipeline.artifacts.runs import Run
from pipeline.errors import ConfigError, RefscoreError, first_line

# what another model leaves in a repository that would be loaded with, or instead of, this one
_OF_A_MODEL = (
    "*.safetensors",
    "*.index.json",
    "pytorch_model*.bin",
    "adapter_model*",
    "*config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
)


def publish_model(run: Run, repository: str, *, private: bool) -> str:
    """Upload the run's model, or its adapter if the model was not merged; returns the address.

    Files of a model that lies there already are deleted if this one lacks them; others stay. The token comes from HF_TOKEN or
    from `hf auth login`. Raises ConfigError if there is nothing to upload, the name is none, or a repository that is there is
    public and `private` was asked for; RefscoreError if the Hub refuses.
    """
    _must_be_a_repository(repository)
    directory = _trained(run)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        if private and not hub.repo_info(repository).private:
            raise ConfigError(
                f"{repository} is there already and is public, so nothing was uploaded: make it private in its settings on the "
                "Hub, name another repository, or leave --private out"
            )
        done = hub.upload_folder(
            repo_id=repository,
            folder_path=directory,
            commit_message=f"refscore run {run.name}",
            ignore_patterns=[".*"],
            delete_patterns=_stale(hub, repository, directory),
        )
    except ConfigError:
        raise
    except LocalTokenNotFoundError:
        raise ConfigError("the Hub asks for a token: set HF_TOKEN, or run 'hf auth login'") from None
    except Exception as error:  # noqa: BLE001  # the errors of the HTTP library below are none of huggingface_hub's
        raise RefscoreError(
            f"{directory} cannot be uploaded to {repository} ({first_line(error)}): check the network, that HF_TOKEN may "
            "write there, and HF_HUB_OFFLINE; the same command goes on with what is missing"
        ) from None
    return str(getattr(done, "repo_url", None) or f"https://huggingface.co/{repository}")


def _must_be_a_repository(repository: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # imported there for all, exported to none

    try:
        validate_repo_id(repository)
        problem = "" if repository.count("/") == 1 else "one '/'"
    except HFValidationError as error:
        problem = first_line(error)
    if problem:
        raise ConfigError(f"--to {repository!r}: a repository on the Hub is named owner/name ({problem})")


def _stale(hub: Any, repository: str, directory: Path) -> list[str]:
    """Patterns of the files of another model in the repository, which this one would not replace."""
    ours = {file.name for file in directory.iterdir()}
    # those in folders are loaded by nobody who asks for the repository
    theirs = [name for name in hub.list_repo_files(repository) if "/" not in name and name not in ours]
    return [glob.escape(name) for name in theirs if any(fnmatch(name, pattern) for pattern in _OF_A_MODEL)]


def _trained(run: Run) -> Path:
    for directory, file in ((run.model, "config.json"), (run.adapter, "adapter_config.json")):
        if (directory / file).is_file():
            if not (directory / "README.md").is_file():
                raise ConfigError(
                    f"{directory} has no model card (README.md): 'refscore train --restart' saves it anew"
                )
            return directory
    raise ConfigError(f"run {run.name!r} holds no trained model: run 'refscore train' with its configuration first")
