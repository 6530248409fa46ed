"""refscore's library, for scripts and notebooks: what `__all__` names. It reads no command line and prints nothing.

Names are imported when they are first used, so that `import pipeline` loads neither torch nor vLLM. docs/python.md shows
all three stages.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pipeline.version import __version__

if TYPE_CHECKING:
    from pipeline.artifacts import schemas as tables
    from pipeline.artifacts.runs import Run, open_run
    from pipeline.artifacts.tables import read_table
    from pipeline.config.experiment import Config
    from pipeline.config.files import load_config
    from pipeline.config.judges import JudgeConfig
    from pipeline.engines.reference import OpenedReference, open_reference
    from pipeline.errors import RefscoreError
    from pipeline.evaluation.compare import differences
    from pipeline.evaluation.evaluate import Evaluation, evaluate
    from pipeline.forward.logps import forward_of
    from pipeline.forward.trees import Tree
    from pipeline.judges.open import JudgeContext, open_judge
    from pipeline.precompute.launch import score
    from pipeline.precompute.pairs_file import write_pairs
    from pipeline.precompute.plan import Plan, make_plan
    from pipeline.precompute.responses import RowScorer
    from pipeline.report.write import write_reports
    from pipeline.rollouts.write import Rollouts, write_rollouts
    from pipeline.training.objectives.losses import PairLogps, preference_loss
    from pipeline.training.train import Trained, train

HOMES = {
    "Config": "pipeline.config.experiment",
    "Evaluation": "pipeline.evaluation.evaluate",
    "JudgeConfig": "pipeline.config.judges",
    "JudgeContext": "pipeline.judges.open",
    "OpenedReference": "pipeline.engines.reference",
    "PairLogps": "pipeline.training.objectives.losses",
    "Plan": "pipeline.precompute.plan",
    "RefscoreError": "pipeline.errors",
    "Rollouts": "pipeline.rollouts.write",
    "RowScorer": "pipeline.precompute.responses",
    "Run": "pipeline.artifacts.runs",
    "Trained": "pipeline.training.train",
    "Tree": "pipeline.forward.trees",
    "differences": "pipeline.evaluation.compare",
    "evaluate": "pipeline.evaluation.evaluate",
    "forward_of": "pipeline.forward.logps",
    "load_config": "pipeline.config.files",
    "make_plan": "pipeline.precompute.plan",
    "open_judge": "pipeline.judges.open",
    "open_reference": "pipeline.engines.reference",
    "open_run": "pipeline.artifacts.runs",
    "preference_loss": "pipeline.training.objectives.losses",
    "read_table": "pipeline.artifacts.tables",
    "score": "pipeline.precompute.launch",
    "tables": "pipeline.artifacts.schemas",
    "train": "pipeline.training.train",
    "write_pairs": "pipeline.precompute.pairs_file",
    "write_reports": "pipeline.report.write",
    "write_rollouts": "pipeline.rollouts.write",
}

__all__ = [  # noqa: RUF022  # in the order of the stages
    "load_config", "Config", "open_run", "Run", "RefscoreError",
    "open_reference", "OpenedReference", "make_plan", "Plan", "score", "write_pairs", "RowScorer",
    "write_rollouts", "Rollouts",
    "Tree", "forward_of", "PairLogps", "preference_loss", "train", "Trained",
    "JudgeConfig", "JudgeContext", "open_judge", "evaluate", "Evaluation", "write_reports", "differences",
    "read_table", "tables",
    "__version__",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(HOMES[name])
    # the only module among them
    value = globals()[name] = home if name == "tables" else getattr(home, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
