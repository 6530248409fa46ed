"""The built wheel, installed into an environment of its own, works in any directory."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import ROOT

UV = Path(sys.executable).parent / "uv"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The directory of programs of an environment that holds the wheel, and beside it the packages of this one."""
    if not UV.is_file():
        pytest.skip("uv is not in this environment, so no wheel can be built")
    where = tmp_path_factory.mktemp("wheel")
    run(UV, "build", "--quiet", "--wheel", "--out-dir", where / "dist", ROOT)
    (wheel,) = (where / "dist").glob("*.whl")
    run(UV, "venv", "--quiet", "--python", sys.executable, where / "env")
    run(UV, "pip", "install", "--quiet", "--no-deps", "--python", where / "env/bin/python", wheel)
    (packages,) = (where / "env/lib").glob("python*/site-packages")
    # the dependencies; lines of .pth files in there are not read, so the checkout is not found
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return where / "env/bin"


def run(*command, cwd=None):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["UV_CACHE_DIR"] = str(ROOT / ".venv" / "uv-cache")
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_library_is_the_installed_one_and_loads_nothing_heavy(installed, tmp_path):
    heavy = "{'torch', 'vllm', 'transformers', 'polars', 'pyarrow', 'numpy'}"
    code = f"import sys, refscore; print(refscore.__file__, len({heavy} & set(sys.modules)))"
    file, loaded = run(installed / "python", "-c", code, cwd=tmp_path).split()
    assert Path(file).is_relative_to(installed.parent)
    assert loaded == "0"


def test_no_name_but_refscore_is_taken(installed, tmp_path):
    """A package that another project calls pipeline, or stages, is the one that is imported, before refscore and after."""
    (packages,) = (installed.parent / "lib").glob("python*/site-packages")
    assert not [name for name in ("pipeline", "stages", "tests") if (packages / name).exists()]
    for name in ("pipeline", "stages"):
        (tmp_path / f"{name}.py").write_text("THEIRS = True\n")
    code = (
        "import sys, pipeline, stages, refscore; from refscore import load_config, open_run, make_plan\n"
        "from refscore.pipeline.engines.protocol import ENGINES; import importlib, refscore.stages.cli\n"
        "assert pipeline.THEIRS and stages.THEIRS\n"
        "assert all(importlib.util.find_spec(facts.scorer[0]) for facts in ENGINES.values())\n"
        "assert not [name for name in sys.modules if name.startswith(('pipeline.', 'stages.'))]\n"
        "print(load_config('demo').train.beta, set(refscore.__all__) <= set(dir(refscore)))"
    )
    assert run(installed / "python", "-c", code, cwd=tmp_path).split() == ["0.05", "True"]


def test_stages_that_start_stages_find_themselves(installed, tmp_path):
    assert "refscore" in run(installed / "python", "-m", "refscore", "--version", cwd=tmp_path)
    code = (
        "import subprocess, types, refscore.stages.steps as steps, pathlib\n"
        "class Child:\n"
        "    def __init__(self, command, env): print(command[2], env['PYTHONPATH'])\n"
        "    def __enter__(self): return self\n"
        "    def __exit__(self, *_): pass\n"
        "    def wait(self): return 0\n"
        "steps.subprocess = types.SimpleNamespace(Popen=Child)\n"
        "steps.step('train', pathlib.Path('demo'), 'r', [])"
    )
    module, path = run(installed / "python", "-c", code, cwd=tmp_path).split()[-2:]
    assert module == "refscore.stages.cli"
    assert (Path(path) / "refscore/stages/cli.py").is_file()


def test_the_commit_of_a_repository_around_it_is_not_ours(installed, tmp_path):
    around = installed.parent.parent
    run("git", "init", "--quiet", around)
    run(
        "git",
        "-c",
        "user.name=n",
        "-c",
        "user.email=e@example",
        "-C",
        around,
        "commit",
        "--allow-empty",
        "-qm",
        "theirs",
    )
    code = "from refscore.pipeline.artifacts.runs import git_commit; print(git_commit())"
    assert run(installed / "python", "-c", code, cwd=tmp_path).strip() == "None"


def test_help_and_a_plan_of_the_demo_in_an_empty_directory(installed, tmp_path, tiny_model):
    assert "precompute" in run(installed / "refscore", "--help", cwd=tmp_path)
    said = run(
        installed / "refscore", "precompute", "--plan",
        "--set", f"reference.model={tiny_model}", "--set", "data.max_rows=20", "--set", "data.max_length=1024",
        cwd=tmp_path,
    )  # fmt: skip
    assert "embedded:demo/train.jsonl" in said
    assert "misses" in said
    assert not (tmp_path / "data/runs/demo/pairs.parquet").exists()


def test_what_the_reports_are_made_of_came_with_it(installed, tmp_path):
    code = "from refscore.pipeline.report.page import environment; print(environment().list_templates())"
    assert "report.html.j2" in run(installed / "python", "-c", code, cwd=tmp_path)
