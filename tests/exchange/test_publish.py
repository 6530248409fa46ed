"""What would be uploaded to the Hub; the Hub itself is out of reach of tests, so its client is recorded."""

from typing import ClassVar

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalTokenNotFoundError

from pipeline.artifacts.runs import Run
from pipeline.errors import ConfigError, RefscoreError
from pipeline.exchange.publish import publish_model


class Recorded:
    """The calls of `HfApi` that are made, with its own names of arguments."""

    calls: ClassVar[list] = []
    error: ClassVar[Exception | None] = None

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        self.calls.append(("create", repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, commit_message=None, ignore_patterns=None):
        if Recorded.error:
            raise Recorded.error
        self.calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir()), ignore_patterns))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(Recorded, "calls", [])
    monkeypatch.setattr(Recorded, "error", None)
    monkeypatch.setattr(huggingface_hub, "HfApi", Recorded)
    return Recorded


def trained(tmp_path, name="model", *files):
    run = Run(tmp_path / "r")
    directory = run.directory / name
    directory.mkdir(parents=True)
    for file in files:
        (directory / file).write_text("x")
    return run


def test_the_client_still_takes_these_arguments():
    import inspect

    from huggingface_hub import HfApi

    assert {"repo_id", "private", "exist_ok"} <= set(inspect.signature(HfApi.create_repo).parameters)
    assert {"repo_id", "folder_path", "commit_message", "ignore_patterns"} <= set(
        inspect.signature(HfApi.upload_folder).parameters
    )


def test_the_model_goes_with_its_card(hub, tmp_path):
    run = trained(tmp_path, "model", "config.json", "README.md", "model.safetensors")
    assert publish_model(run, "lab/model", private=True) == "https://huggingface.co/lab/model"
    assert hub.calls == [
        ("create", "lab/model", True, True),
        ("upload", "lab/model", ["README.md", "config.json", "model.safetensors"], [".*"]),
    ]


def test_an_adapter_goes_if_there_is_no_merged_model(hub, tmp_path):
    publish_model(trained(tmp_path, "adapter", "adapter_config.json", "README.md"), "lab/a", private=False)
    assert hub.calls[1][2] == ["README.md", "adapter_config.json"]


@pytest.mark.parametrize(
    ("files", "to", "problem"),
    [
        ((), "lab/m", "holds no trained model"),
        (("config.json",), "lab/m", "no model card"),
        (("config.json", "README.md"), "model", "owner/name"),
    ],
)
def test_what_cannot_go_is_said_before_the_hub_is_asked(hub, tmp_path, files, to, problem):
    with pytest.raises(ConfigError, match=problem):
        publish_model(trained(tmp_path, "model", *files), to, private=False)
    assert not hub.calls


def test_what_the_hub_refuses_is_a_message(hub, tmp_path):
    run = trained(tmp_path, "model", "config.json", "README.md")
    Recorded.error = LocalTokenNotFoundError("none")
    with pytest.raises(ConfigError, match="HF_TOKEN"):
        publish_model(run, "lab/m", private=False)
    Recorded.error = ConnectionError("no route")
    with pytest.raises(RefscoreError, match="no route"):
        publish_model(run, "lab/m", private=False)
