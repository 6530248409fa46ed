"""The names for scripts and notebooks: all there, described, and loaded when they are used."""

import inspect
import subprocess
import sys

import pytest

import pipeline
from tests.conftest import ROOT


def test_importing_it_loads_neither_torch_nor_vllm():
    code = "import sys, pipeline; print(sorted({'torch', 'vllm', 'transformers', 'pydantic', 'polars'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", pipeline.__all__)
def test_every_name_is_there_and_described(name):
    value = getattr(pipeline, name)
    assert name in dir(pipeline)
    if name != "__version__":
        assert inspect.getdoc(value)
        assert inspect.ismodule(value) == (name == "tables")


def test_every_home_is_in_the_list():
    assert set(pipeline.__all__) == {*pipeline.HOMES, "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pipeline.nothing  # noqa: B018


def test_the_version_is_the_packages():
    assert f'version = "{pipeline.__version__}"' in (ROOT / "pyproject.toml").read_text()
