"""A trained model to the Hugging Face Hub, with the card that was written when it was saved."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.artifacts.runs import Run
from pipeline.errors import ConfigError, RefscoreError, first_line

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def publish_model(run: Run, repository: str, *, private: bool) -> str:
    """Upload the run's model, or its adapter if the model was not merged; returns the address.

    The token comes from HF_TOKEN or from `hf auth login`. Raises ConfigError if there is nothing to upload or the name is none,
    RefscoreError if the Hub refuses.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise ConfigError(f"--to {repository!r}: a repository on the Hub is named owner/name")
    directory = _trained(run)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        done = hub.upload_folder(
            repo_id=repository, folder_path=directory, commit_message=f"refscore run {run.name}", ignore_patterns=[".*"]
        )
    except LocalTokenNotFoundError:
        raise ConfigError("the Hub asks for a token: set HF_TOKEN, or run 'hf auth login'") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise RefscoreError(
            f"{directory} cannot be uploaded to {repository} ({first_line(error)}): check the network, that HF_TOKEN may "
            "write there, and HF_HUB_OFFLINE; the same command goes on with what is missing"
        ) from None
    return str(getattr(done, "repo_url", None) or f"https://huggingface.co/{repository}")


def _trained(run: Run) -> Path:
    for directory, file in ((run.model, "config.json"), (run.adapter, "adapter_config.json")):
        if (directory / file).is_file():
            if not (directory / "README.md").is_file():
                raise ConfigError(
                    f"{directory} has no model card (README.md): 'refscore train --restart' saves it anew"
                )
            return directory
    raise ConfigError(f"run {run.name!r} holds no trained model: run 'refscore train' with its configuration first")
