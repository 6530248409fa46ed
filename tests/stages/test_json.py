"""--json: one value on standard output and nothing else; what is said goes to the error stream."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, experiment, preference_rows, refscore_here, write_rows


def asked(where, *arguments):
    """What a command writes to its two streams; the first must be JSON and nothing else."""
    done = subprocess.run(
        [sys.executable, "-m", "stages.cli", *map(str, arguments), "--json"],
        cwd=where, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model):
    where = tmp_path_factory.mktemp("json")
    config = experiment(where, tiny_model, write_rows(where / "d.jsonl", [*preference_rows(24), {"prompt": 5}]))
    refscore_here(where, "precompute", "--config", config, "--run", "a")
    refscore_here(where, "precompute", "--config", config, "--run", "b", "--set", "train.beta=0.3")
    return where, config


def test_a_plan(made):
    where, config = made
    plan, said = asked(where, "plan", "--config", config, "--scoring-speed", 100, "--training-speed", 50)
    assert "48 hits, 0 misses" in said
    assert (plan["sequences"], plan["hits"], plan["misses"]) == (48, 48, 0)
    assert sum(plan["pairs"].values()) == 24
    assert plan["rows"] == 24 + sum(plan["dropped"].values()) == 25
    assert plan["warnings"]
    assert plan["training"]["steps"] == 4
    assert plan["training"]["fits"] is True
    assert plan["training"]["gib"] * 2**30 > sum(plan["training"]["bytes"].values())
    assert (plan["training"]["tokens_per_second"], plan["scoring"]["tokens_per_second"]) == (50, 100)
    parts = {name: size for name, size in plan["disk_bytes"].items() if name not in ("free", "total")}
    assert plan["disk_bytes"]["total"] == sum(parts.values())


def test_a_comparison(made):
    where, _ = made
    compared, said = asked(where, "compare", "a", "b")
    assert "train.beta" in said
    assert compared["runs"] == ["a", "b"]
    assert compared["settings"]["train.beta"] == {"a": "0.1", "b": "0.3"}
    assert compared["results"] == {"a": None, "b": None}
    assert (where / compared["page"]).is_file()


def test_the_store(made):
    where, _ = made
    held, said = asked(where, "store", "ls")
    (reference,) = held["references"]
    assert reference["sequences"] == 48
    assert reference["runs"] == ["a", "b"]
    assert reference["reference_id"][:12] in said


def test_a_failure_is_no_json(made):
    where, _ = made
    done = subprocess.run(
        [sys.executable, "-m", "stages.cli", "compare", "absent", "--json"],
        cwd=where, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "does not exist" in done.stderr
