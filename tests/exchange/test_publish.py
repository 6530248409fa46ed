"""What would be uploaded to the Hub; the Hub itself is out of reach of tests, so its client is recorded."""

from types import SimpleNamespace
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
    is_private: ClassVar[bool] = True
    there: ClassVar[list[str]] = []
    deleted: ClassVar[list[str] | None] = None

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        self.calls.append(("create", repo_id, private, exist_ok))

    def repo_info(self, repo_id):
        assert repo_id == "lab/model"
        return SimpleNamespace(private=Recorded.is_private)

    def list_repo_files(self, _repo_id):
        return Recorded.there

    def upload_folder(self, *, repo_id, folder_path, commit_message=None, ignore_patterns=None, delete_patterns=None):
        if Recorded.error:
            raise Recorded.error
        Recorded.deleted = delete_patterns
        self.calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir()), ignore_patterns))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(Recorded, "calls", [])
    for name, value in {"error": None, "is_private": True, "there": [], "deleted": None}.items():
        monkeypatch.setattr(Recorded, name, value)
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
    assert {"repo_id", "folder_path", "commit_message", "ignore_patterns", "delete_patterns"} <= set(
        inspect.signature(HfApi.upload_folder).parameters
    )
    for method in (HfApi.repo_info, HfApi.list_repo_files):
        inspect.signature(method).bind(None, "lab/model")


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
        (("config.json", "README.md"), "a/b/c", "owner/name"),
        (("config.json", "README.md"), "me/..", "owner/name"),
        (("config.json", "README.md"), "me/a--b", "owner/name"),
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
    # an error of the HTTP library below, which is none of huggingface_hub's
    Recorded.error = type("ReadTimeout", (Exception,), {})("timed out")
    with pytest.raises(RefscoreError, match=r"timed out.*network"):
        publish_model(run, "lab/m", private=False)


def test_files_of_the_model_before_do_not_outlive_it(hub, tmp_path):
    """transformers takes model.safetensors before shards, and an adapter_config.json makes of every model an adapted one."""
    hub.there = [
        "model.safetensors", "model-00001-of-00003.safetensors", "adapter_config.json", "adapter_model.safetensors",
        "chat_template.jinja", "pytorch_model.bin", "generation_config.json", "config.json", "README.md", ".gitattributes",
        "plot[1].png", "older/model.safetensors", "added_tokens.json",
    ]  # fmt: skip
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json")
    run = trained(tmp_path, "model", "config.json", "README.md", *shards)
    publish_model(run, "lab/model", private=False)
    from fnmatch import fnmatch

    gone = [name for name in hub.there if any(fnmatch(name, pattern) for pattern in hub.deleted)]
    assert gone == [
        "model.safetensors", "model-00001-of-00003.safetensors", "adapter_config.json", "adapter_model.safetensors",
        "chat_template.jinja", "pytorch_model.bin", "generation_config.json", "added_tokens.json",
    ]  # fmt: skip


def test_nothing_goes_to_a_public_repository_that_was_to_be_private(hub, tmp_path):
    run = trained(tmp_path, "model", "config.json", "README.md")
    hub.is_private = False
    with pytest.raises(ConfigError, match=r"is public, so nothing was uploaded.*--private"):
        publish_model(run, "lab/model", private=True)
    assert [call[0] for call in hub.calls] == ["create"]
    publish_model(run, "lab/model", private=False)
    assert hub.calls[-1][0] == "upload"
