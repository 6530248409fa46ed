"""The mutation run: how many small changes of the code that makes numbers does a test notice?

`make mutants` runs mutmut over every file named below, each mutant against the tests named beside its file, and prints
the table of tests/README.md; `make mutants FILE=training/objectives/losses` runs one file. The work happens in copies below
data/cache/mutants/. A file without mutants or a name without a test is an error: a run over nothing must not look well.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from mutmut.stats import status_by_exit_code

ROOT = Path(__file__).parent.parent
PLACE = ROOT / "data" / "cache" / "mutants"
# what covers a file without starting an engine or a process; everything below tests/
COVERING = {
    "training/objectives/losses": ["training/test_losses.py", "config/test_losses.py", "theory/test_dpo.py"],
    "training/objectives/unpaired": ["training/test_unpaired_losses.py", "theory/test_unpaired_and_ranked.py"],
    "training/objectives/ranked": ["training/test_ranked_losses.py", "theory/test_unpaired_and_ranked.py"],
    "training/schedule": ["training/test_schedule.py"],
    "evaluation/rates/statistics": ["evaluation/test_statistics.py"],
    "evaluation/rates/paired": ["evaluation/test_paired.py"],
    "evaluation/rates/seeds": ["evaluation/test_seeds.py"],
    "evaluation/rates/winrates": [
        "judges/test_judging.py",
        "exchange/test_judged_samples.py",
        "evaluation/test_winrates.py",
    ],
    "engines/sharing": ["engines/test_vllm_runners.py", "engines/test_transformers.py"],
    "engines/vllm/runners": ["engines/test_vllm_runners.py"],
    "pairs/splits": ["pairs/test_splits.py", "pairs/test_sources.py"],
    "pairs/encoding": ["pairs/test_encoding.py", "pairs/test_control_tokens.py"],
    "forward/output_layer": ["forward/test_output_layer.py"],
    "evaluation/kl": ["evaluation/test_kl.py"],
    "forward/cpu_attention": ["forward/test_cpu_attention.py"],
    "forward/attention": ["forward/test_attention.py", "forward/test_flex.py"],
    "forward/block_mask": ["forward/test_flex.py"],
    "forward/logps": ["forward/test_logps.py"],
    "forward/trees": ["forward/test_trees.py"],
    "training/optimizers": ["training/test_optimizers.py", "training/test_lean.py"],
    "training/checkpoint": ["training/test_checkpoint.py"],
    "artifacts/digests": ["artifacts/test_digests.py"],
    "store/identity": ["store/test_identity.py", "store/test_identity_fuzz.py", "store/test_lookup.py"],
    "models/identity": ["store/test_identity.py", "store/test_identity_fuzz.py"],
    "models/weights": ["models/test_weights.py", "store/test_identity.py"],
    "store/store": ["store/test_store.py", "store/test_lookup.py", "store/test_places.py"],
    "store/shard": ["store/test_shard.py", "store/test_store.py", "store/test_lookup.py", "store/test_places.py"],
    "store/lookup": ["store/test_lookup.py", "store/test_store.py", "store/test_places.py"],
    "precompute/join": ["precompute/test_plan.py"],
}
LOGGING = {"debug", "info", "warning", "error", "exception"}
# which UTF-8 is meant by: None is what this platform takes
_ENCODINGS = {"utf-8", "ascii", "none"}


class Count(NamedTuple):
    """The verdicts on one file's mutants; `aside` counts those that change nothing a program could see."""

    killed: int
    survivors: list[str]
    aside: int
    seconds: float

    @property
    def share(self) -> float:
        return self.killed / (self.killed + len(self.survivors))


def main(names: list[str]) -> None:
    if unknown := sorted(set(names) - set(COVERING)):
        sys.exit(f"no tests are named for {', '.join(unknown)}; known are {', '.join(COVERING)}")
    print("| file | mutants | killed | survivors | share | set aside | seconds |\n|---|--:|--:|--:|--:|--:|--:|")
    survivors = []
    for name in names or COVERING:
        count = run(name)
        mutants = count.killed + len(count.survivors)
        print(
            f"| {name} | {mutants} | {count.killed} | {len(count.survivors)} | {count.share:.1%} | {count.aside} "
            f"| {count.seconds:.0f} |",
            flush=True,
        )
        survivors += count.survivors
    print("\n" + "\n\n".join(survivors))


def run(name: str) -> Count:
    """Every mutant of pipeline/<name>.py against its tests."""
    where = PLACE / name
    copy_with_settings(name, where)
    start = time.monotonic()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "mutmut", "run", "--max-children", os.environ.get("MUTANTS_CHILDREN", "1")],
        cwd=where,
        env={**environment, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - start
    meta = where / "mutants" / "pipeline" / f"{name}.py.meta"
    if done.returncode or not meta.is_file():
        sys.exit(f"mutmut failed on {name}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    codes = json.loads(meta.read_text(encoding="utf-8"))["exit_code_by_key"]
    return judged(codes, meta.with_suffix("").read_text(encoding="utf-8"), seconds)


def copy_with_settings(name: str, where: Path) -> None:
    """A copy of the sources in which mutmut may write, told to mutate one file and to run the tests that cover it."""
    tests = [f"tests/{path}" for path in COVERING[name]]
    if absent := [path for path in [*tests, f"pipeline/{name}.py"] if not (ROOT / path).is_file()]:
        sys.exit(f"{name} names files that do not exist: {', '.join(absent)}")
    shutil.rmtree(where, ignore_errors=True)
    for part in ("pipeline", "stages", "tests"):
        shutil.copytree(ROOT / part, where / part, ignore=shutil.ignore_patterns("__pycache__"))
    (where / "pyproject.toml").write_text(
        f"""[tool.pytest.ini_options]
markers = ["engine: starts a real vLLM engine"]
[tool.mutmut]
source_paths = ["pipeline"]
only_mutate = ["pipeline/{name}.py"]
also_copy = ["stages"]
pytest_add_cli_args = ["-p", "no:cacheprovider", "-m", "not engine"]
pytest_add_cli_args_test_selection = {json.dumps(tests)}
use_git_change_detection = false
track_dependencies = false
""",
        encoding="utf-8",
    )


def judged(codes: dict[str, int | None], mutated: str, seconds: float) -> Count:
    """Counts from mutmut's exit codes and the file that holds every original and mutant beside each other.

    Raises:
        SystemExit: no mutant was made, or one has no verdict.
    """
    functions = {node.name: node for node in ast.walk(ast.parse(mutated)) if isinstance(node, ast.FunctionDef)}
    killed, aside, survivors = 0, 0, []
    for key, code in codes.items():
        name = key.rpartition(".")[2]
        original, mutant = functions[f"{name.rpartition('__mutmut_')[0]}__mutmut_orig"], functions[name]
        status = status_by_exit_code[code]
        if status not in {"killed", "timeout", "survived", "no tests", "segfault"}:
            sys.exit(f"{key} has no verdict: {status}")
        if without_asides(original) == without_asides(mutant):
            aside += 1
        elif status in {"survived", "no tests"}:
            survivors.append(f"{key} ({status})\n{difference(original, mutant)}")
        else:
            killed += 1
    if not killed and not survivors:
        sys.exit("no mutant was made: nothing was tested")
    return Count(killed, survivors, aside, seconds)


class _Asides(ast.NodeTransformer):
    """Empties what is said to a person (the arguments of raised errors and of log lines) and the names of moments at which
    fault tests kill; takes two keywords away: `strict` of a zip, a guard over lists that were made side by side, and the
    spelling of an encoding.
    """

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        if getattr(node.func, "attr", "") == "reached":
            node.args = []
        node.keywords = [
            one
            for one in node.keywords
            if not (one.arg == "strict" and getattr(node.func, "id", "") == "zip")
            and not (one.arg == "encoding" and _spelling(one.value) in _ENCODINGS)
        ]
        return node

    def visit_Raise(self, node: ast.Raise) -> ast.Raise:
        self.generic_visit(node)
        if isinstance(node.exc, ast.Call):
            node.exc = ast.Call(node.exc.func, [], [])
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.Expr:
        self.generic_visit(node)
        if isinstance(node.value, ast.Call) and getattr(node.value.func, "attr", "") in LOGGING:
            node.value = ast.Call(node.value.func, [], [])
        return node


def _spelling(value: ast.expr) -> str:
    return str(value.value).lower() if isinstance(value, ast.Constant) else ""


def without_asides(function: ast.FunctionDef) -> str:
    """The function's signature and body as text, without what `_Asides` takes away."""
    copy = _Asides().visit(ast.parse(ast.unparse(function)).body[0])
    return ast.unparse(copy).replace(function.name, "function")


def difference(original: ast.FunctionDef, mutant: ast.FunctionDef) -> str:
    """The lines that the mutant changed."""
    before, after = (ast.unparse(node).replace(node.name, "").splitlines() for node in (original, mutant))
    lines = [f"- {line.strip()}" for line in before if line not in after]
    return "\n".join(lines + [f"+ {line.strip()}" for line in after if line not in before])


if __name__ == "__main__":
    main(sys.argv[1:])
