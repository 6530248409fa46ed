"""Nothing is written outside the working directory without being asked, and what the user says goes."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from pipeline.config.experiment import ReferenceConfig
from pipeline.errors import ConfigError
from pipeline.models.locate import at_hand, locate
from stages import libraries
from tests.conftest import ROOT, experiment, must_leave_nothing_outside, preference_rows, run_stages, write_rows
from tests.stages.test_stale import FIRST, in_hub_cache

ASKED = """
import json, os, sys
sys.argv = ["refscore", "--version"]
from stages.cli import main
try: main()
except SystemExit: pass
from huggingface_hub import constants
import datasets.config
print(json.dumps([constants.HF_HUB_CACHE, str(datasets.config.HF_DATASETS_CACHE), constants.HF_TOKEN_PATH, *(os.environ.get(name) for name in ("TORCH_HOME", "TRITON_CACHE_DIR"))]))
"""


def places(where, **environment):
    """Where libraries keep things: the Hub's models, its data, its token, torch's, Triton's."""
    home = where / "home"
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", ASKED], cwd=where, capture_output=True, text=True, check=True,
        env={"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def test_caches_are_here_unless_the_user_says_where(tmp_path):
    cache = tmp_path / "data/cache"
    hub = str(cache / "huggingface")
    default = [f"{hub}/hub", f"{hub}/datasets", f"{hub}/token", str(cache / "torch"), str(cache / "triton")]
    assert places(tmp_path) == default
    assert places(tmp_path, HF_HOME="/far")[:3] == ["/far/hub", "/far/datasets", "/far/token"]
    assert places(tmp_path, HF_HUB_CACHE="/far")[:2] == ["/far", f"{hub}/datasets"]
    of_xdg = places(tmp_path, XDG_CACHE_HOME="/far")
    assert of_xdg[:4] == ["/far/huggingface/hub", "/far/huggingface/datasets", "/far/huggingface/token", None]
    assert places(tmp_path, TRITON_HOME="/far")[4] is None
    # the token is where the Hub's own tools put it
    own = tmp_path / "home/.cache/huggingface/token"
    own.parent.mkdir(parents=True)
    own.write_text("x")
    assert places(tmp_path)[2] == str(own)


@pytest.fixture
def homely(tmp_path, tiny_model, monkeypatch):
    """A model in the Hub's cache of the home directory, while another cache is used here."""
    import huggingface_hub

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return in_hub_cache(tmp_path / "home/.cache/huggingface/hub", FIRST, tiny_model)


@pytest.mark.parametrize("revision", [None, FIRST])
def test_a_model_that_other_tools_fetched_is_read_where_it_lies(tmp_path, homely, revision):
    spec = ReferenceConfig(model="tests/tiny", revision=revision)
    before = sorted((tmp_path / "home").rglob("*"))
    assert locate(spec) == at_hand(spec) == homely
    assert sorted((tmp_path / "home").rglob("*")) == before
    (homely / "model.safetensors").unlink()
    assert at_hand(spec) is None
    with pytest.raises(ConfigError, match="not in the local Hub cache"):
        locate(spec)


def test_who_has_no_home_needs_none(tmp_path, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", home)
    monkeypatch.delenv("HF_HOME", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        libraries.keep_caches_here()
        assert os.environ["HF_HOME"] == str(tmp_path / "data/cache/huggingface")
    with pytest.raises(ConfigError, match="not in the local Hub cache"):
        locate(ReferenceConfig(model="tests/absent"))


def test_scoring_a_folder_leaves_nothing_outside(tmp_path, tiny_model):
    """And training: tests/stages/test_pipeline.py."""
    shutil.copytree(tiny_model, tmp_path / "model")
    # a folder, which the library for data sets reads
    folder = write_rows(tmp_path / "folder/train.jsonl", preference_rows(12)).parent
    config = experiment(tmp_path, tmp_path / "model", folder)
    must_leave_nothing_outside(tmp_path, run_stages(tmp_path, config, "r", "precompute"))
