"""`make frontier`: what objectives get for the KL that they spend, on controlled sentiment (figure 2 of the DPO paper, 2305.18290).

Every method, each beta, three seeds, on one set of scores: DPO, IPO, SFT on the chosen responses, and DPO on pairs whose
labels are shuffled, which must get nothing; and policy gradient on eight samples of each training prompt, by the true reward. Beside
them the best of n responses of the untrained reference by the true reward,
whose KL is at most log n - (n - 1) / n (Beirami et al. 2024, 2401.01879). Runs that are complete are not trained again.
Writes docs/frontier.svg and prints the tables of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.artifacts.markdown import markdown_table
from pipeline.artifacts.runs import RUNS, Run, open_run
from pipeline.config.experiment import Config, GenerateConfig
from pipeline.config.files import load_config
from pipeline.config.training import PolicyConfig
from pipeline.judges.sentiment import sentiment

DIRECTORY = Path("data/cache/frontier")
DATA = Path("data/demo")
TRUE, INDEPENDENT = "vader:even", "textblob:odd"
SEEDS = (0, 1, 2)
STEPS, PROMPTS, RESPONSES = 16, 48, 2
BEST_OF = (1, 2, 4, 8, 16)
REFERENCE = "reference"

Key = tuple[str, float, int]


@dataclass(frozen=True)
class Method:
    """An objective with the betas that trace its frontier, and what it learns from."""

    name: str
    loss_type: str
    betas: tuple[float, ...]
    pairs: str = "train"

    @property
    def samples(self) -> bool:
        """Whether it learns from samples and their true rewards, `betas` being weights of its KL to the reference."""
        return self.loss_type == "policy_gradient"


METHODS = (
    Method("DPO", "sigmoid", (0.05, 0.3, 1.0)),
    Method("IPO", "ipo_sum", (0.02, 0.2)),
    Method("SFT on chosen", "sft", (0.05,)),
    Method("DPO, labels shuffled", "sigmoid", (0.05,), "shuffled"),
    Method("policy gradient", "policy_gradient", (0.0, 0.03, 0.1)),
)


@dataclass(frozen=True)
class Measured:
    """A model on the held-out prompts: KL in nats and rewards in [0, 1] by judge, each a mean per prompt, prompts in one order."""

    kl: np.ndarray
    rewards: dict[str, np.ndarray]


def main() -> None:
    """Score, train every run that is missing, evaluate, each in one process; then tables and picture."""
    parser = argparse.ArgumentParser(description="reward against KL of several objectives")
    parser.add_argument("--stage", choices=tuple(STAGES), help="one stage of all runs, in this process")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), choices=SEEDS)
    parser.add_argument("--methods", nargs="+", default=[method.name for method in METHODS], metavar="NAME")
    parser.add_argument("--picture", default="docs/frontier.svg", help="where the picture goes")
    given = parser.parse_args()
    choose(given.seeds, given.methods)
    if given.stage:
        STAGES[given.stage]()
        return
    begun = time.monotonic()
    write_data()
    # vLLM pins the threads of the process that it runs in, which training needs
    for name in STAGES:
        command = [sys.executable, "-m", "tests.benchmarks.frontier", "--stage", name, *sys.argv[1:]]
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"stage {name} failed")
    best = best_of_n()
    report(best, (time.monotonic() - begun) / 60, given.picture)


def choose(seeds: list[int], methods: list[str]) -> None:
    """Look at some seeds and methods alone."""
    global SEEDS, METHODS  # what all functions here look at
    SEEDS, METHODS = tuple(seeds), tuple(method for method in METHODS if method.name in methods)
    if not METHODS:
        sys.exit(f"no such method: {', '.join(methods)}")


def report(best: dict[int, dict[str, float]], minutes: float, picture: str) -> None:
    """Print the tables, write the picture."""
    measured = {key: measure(run, "policy") for key, run in runs()}
    measured[REFERENCE, 0.0, 0] = measure(next(runs())[1], REFERENCE)
    print(f"{len(SEEDS)} seeds, {STEPS} steps of 8 pairs, {PROMPTS} held-out prompts x {RESPONSES} responses")
    print(f"{minutes:.0f} minutes, of which runs that were there already took none\n")
    print(
        markdown_table(("method", "beta", "KL, nats", "true reward", "independent judge"), table(measured, best)), "\n"
    )
    print(markdown_table(("method", "area, true reward", "area, independent judge"), areas(measured)))
    draw(measured, best, picture)
    print(f"\n{picture}")


def runs() -> Iterator[tuple[Key, Run]]:
    """Every run by method, beta and seed."""
    for seed in SEEDS:
        for method in METHODS:
            for beta in method.betas:
                yield (method.name, beta, seed), Run(RUNS / f"frontier-{method.loss_type}-{method.pairs}-{beta}-{seed}")


def write_data() -> None:
    """The pairs of the demo, fewer held out; and for each seed the same pairs, half of them with exchanged labels."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    held_out = _lines(DATA / "eval.jsonl")
    every = max(1, len(held_out) // PROMPTS)
    _write("eval", held_out[::every][:PROMPTS])
    rows = _lines(DATA / "train.jsonl")
    _write("train", rows)
    for seed in SEEDS:
        exchanged = half_of([row["margin"] for row in rows], np.random.default_rng(seed))
        _write(f"shuffled{seed}", [swapped(row) if swap else row for row, swap in zip(rows, exchanged, strict=True)])


def half_of(margins: list[float], rng: np.random.Generator) -> np.ndarray:
    """Of every two pairs with neighbouring margins a coin takes one, so that the labels say nothing at any margin."""
    order = np.argsort(margins, kind="stable")
    taken = np.zeros(len(margins), dtype=bool)
    for first, second in zip(order[::2], order[1::2], strict=False):
        taken[first if rng.random() < 0.5 else second] = True
    return taken


def swapped(row: dict[str, Any]) -> dict[str, Any]:
    """The pair with its labels exchanged."""
    sides = {"chosen": "rejected", "rejected": "chosen"}
    return {sides.get(name, name): value for name, value in row.items() if not name.endswith("_cut_off")} | {
        f"{sides[name]}_cut_off": row[f"{name}_cut_off"] for name in sides
    }


def method_of(key: Key) -> Method:
    """The method of a run."""
    return next(method for method in METHODS if method.name == key[0])


def config_of(key: Key) -> Config:
    """The demo's configuration with what differs in this run."""
    _, beta, seed = key
    method = method_of(key)
    pairs = f"{method.pairs}{seed if method.pairs == 'shuffled' else ''}"
    settings = {
        "data.path": DIRECTORY / f"{pairs}.jsonl", "data.eval_path": DIRECTORY / "eval.jsonl",
        "train.seed": seed, "train.max_steps": STEPS,
        "train.eval_steps": 0, "train.save_steps": 0, # what is judged is what KL is measured on: one sampling does for both
        "generate.samples": RESPONSES, "generate.kl_samples": RESPONSES, "generate.fixed_length": "false",
        "judge": f'["rule:sentiment={TRUE}", "rule:sentiment={INDEPENDENT}"]',
    }  # fmt: skip
    if method.samples:
        settings |= {
            "train.objective": "policy_gradient", "train.policy_gradient.kl_coef": beta, "train.policy_gradient.max_kl": "null",
            "rollout.judge": f"rule:sentiment={TRUE}",
        }  # fmt: skip
    else:
        settings |= {"train.loss_type": method.loss_type, "train.beta": beta}
    return load_config("demo", [f"{field}={value}" for field, value in settings.items()])


def score_all() -> None:
    """Score every pair: swapped ones have the same sequences; sample, reward and score the training prompts."""
    from pipeline import make_plan, score
    from pipeline.rollouts.write import write_rollouts

    score(make_plan(config_of(next(runs())[0])))
    # what one run samples the others use again
    for key, run in runs():
        if method_of(key).samples and not run.model.is_dir():
            write_rollouts(config_of(key), open_run(run.name))


def train_all() -> None:
    """Train every run that is not trained."""
    from pipeline import make_plan, score, train, write_pairs

    for key, run in runs():
        if run.model.is_dir():
            continue
        config = config_of(key)
        if not method_of(key).samples:
            plan = make_plan(config)
            write_pairs(plan, config, open_run(run.name), quarantined=score(plan, run.directory))
        train(config, run)
        print(f"trained {run.name}", flush=True)


def evaluate_all() -> None:
    """Evaluate every run that is not evaluated."""
    from pipeline import evaluate, write_reports

    for key, run in runs():
        if not run.eval.is_file():
            config = config_of(key)
            write_reports(run, config, evaluate(config, run))
            print(f"evaluated {run.name}", flush=True)


def measure(run: Run, model: str) -> Measured:
    """From kl.parquet: rewards of the very responses whose KL is measured."""
    table = pl.read_parquet(run.directory / "kl.parquet").filter(pl.col("model") == model).sort("prompt_id", "sample")
    if model != REFERENCE and table["exact_kl"].null_count():
        sys.exit(f"{run.name}: KL was not measured for all responses")
    kl = table.select(pl.col("exact_kl").list.sum().fill_null(0.0)).to_series()
    frame = table.select("prompt_id").with_columns(
        kl.alias("kl"),
        *(pl.Series(judge, rewards(judge, table["response"].to_list())) for judge in (TRUE, INDEPENDENT)),
    )
    means = frame.group_by("prompt_id", maintain_order=True).mean()
    return Measured(means["kl"].to_numpy(), {judge: means[judge].to_numpy() for judge in (TRUE, INDEPENDENT)})


def rewards(judge: str, texts: list[str]) -> list[float]:
    """Rewards in [0, 1], as `rule:sentiment=<judge>` gives them."""
    return [(sentiment(judge)(text) + 1) / 2 for text in texts]


def best_of_n() -> dict[int, dict[str, float]]:
    """For n: the bound of the KL, and what both judges give the response of n that the true reward prefers."""
    texts = reference_responses()
    true, independent = (np.array([rewards(judge, of_prompt) for of_prompt in texts]) for judge in (TRUE, INDEPENDENT))
    return {
        n: {"kl": math.log(n) - (n - 1) / n, TRUE: expected_best(true, true, n), INDEPENDENT: expected_best(true, independent, n)}
        for n in BEST_OF
    }  # fmt: skip


def expected_best(by: np.ndarray, of: np.ndarray, n: int) -> float:
    """Mean of `of` at the best by `by` of n drawn without replacement from each row: exact over all draws, rows [prompts, N].

    The i-th smallest of N is the best of C(i - 1, n - 1) of the C(N, n) draws; equals share what their places give.
    """
    total = by.shape[1]
    weights = np.array([math.comb(place, n - 1) for place in range(total)]) / math.comb(total, n)
    means = []
    for ranked, valued in zip(by, of, strict=True):
        shared = np.array([weights[np.sort(ranked) == reward].mean() for reward in ranked])
        means.append(float((shared * valued).sum()))
    return float(np.mean(means))


STAGES = {"score": score_all, "train": train_all, "evaluate": evaluate_all}


@cache
def reference_responses() -> list[list[str]]:
    """The reference's responses to the held-out prompts, as many as the largest n."""
    from pipeline.engines.vllm.generator import generator
    from pipeline.models.load import load_tokenizer
    from pipeline.models.locate import locate

    kept = DIRECTORY / "reference.json"
    if not kept.is_file():
        spec = PolicyConfig()
        directory = locate(spec)
        tokenizer = load_tokenizer(directory, spec)
        prompts = [
            tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] for row in _lines(DIRECTORY / "eval.jsonl")
        ]
        settings = GenerateConfig(max_tokens=32, temperature=1.0, samples=max(BEST_OF), seed=7, dtype="float32")
        with generator(directory, spec, max(map(len, prompts)), settings) as generate:
            samples = generate(prompts, settings, lambda *_: None)
        kept.write_text(json.dumps([[sample.text for sample in of_prompt] for of_prompt in samples]))
    texts: list[list[str]] = json.loads(kept.read_text())
    return texts


def table(measured: dict[Key, Measured], best: dict[int, dict[str, float]]) -> list[list[str]]:
    """A row per method and beta: means over seeds, with 95 % intervals over prompts and seeds."""
    reference = measured[REFERENCE, 0.0, 0]
    rows = [["reference", "", "0", *(interval_of([reference.rewards[judge]]) for judge in (TRUE, INDEPENDENT))]]
    for method in METHODS:
        for beta in method.betas:
            runs = [measured[method.name, beta, seed] for seed in SEEDS]
            figures = [
                [run.kl for run in runs],
                *([run.rewards[judge] for run in runs] for judge in (TRUE, INDEPENDENT)),
            ]
            shown = "" if method.loss_type == "sft" else f"{beta:g}"
            rows.append([method.name, shown, *(interval_of(figure) for figure in figures)])
    for n, figures_of_n in best.items():
        values = [f"{figures_of_n[name]:.3f}" for name in (TRUE, INDEPENDENT)]
        rows.append([f"best of {n}", "", f"at most {figures_of_n['kl']:.2f}", *values])
    return rows


def areas(measured: dict[Key, Measured]) -> list[list[str]]:
    """Mean gain in reward over the reference along each method's frontier, up to the smallest KL that all methods reach."""
    methods = [method for method in METHODS if method.pairs != "shuffled"]
    reach = min(
        max(measured[method.name, beta, seed].kl.mean() for beta in method.betas)
        for method in methods
        for seed in SEEDS
    )  # fmt: skip
    rows = []
    for method in methods:
        cells = []
        for judge in (TRUE, INDEPENDENT):
            draws = list(resampled(len(measured[REFERENCE, 0.0, 0].kl)))
            found = [area(measured, method, judge, reach, seeds, prompts) for seeds, prompts in draws]
            everything = area(measured, method, judge, reach, SEEDS, np.arange(PROMPTS))
            low, high = np.quantile(found, (0.025, 0.975))
            cells.append(f"{everything:.3f} [{low:.3f}, {high:.3f}]")
        rows.append([f"{method.name}, to {reach:.1f} nats", *cells])
    return rows


def area(
    measured: dict[Key, Measured], method: Method, judge: str, reach: float, seeds: tuple[int, ...], prompts: np.ndarray
) -> float:
    """Area between 0 and `reach` nats under the line through the reference and the method's models, by `reach`, less the
    reference's reward; mean over seeds.
    """
    start = measured[REFERENCE, 0.0, 0].rewards[judge][prompts].mean()
    found = []
    for seed in seeds:
        runs = [measured[method.name, beta, seed] for beta in method.betas]
        points = sorted([(0.0, start), *((run.kl[prompts].mean(), run.rewards[judge][prompts].mean()) for run in runs)])
        kl, reward = (np.array(values) for values in zip(*points, strict=True))
        grid = np.linspace(0, reach, 200)
        found.append(float(np.interp(grid, kl, reward).mean()) - start)
    return float(np.mean(found))


def resampled(prompts: int, times: int = 1000) -> list[tuple[tuple[int, ...], np.ndarray]]:
    """Draws of seeds and prompts with replacement."""
    rng = np.random.default_rng(0)
    return [
        (tuple(map(int, rng.choice(SEEDS, len(SEEDS)))), rng.integers(0, prompts, prompts)) for _ in range(times)
    ]  # fmt: skip


def interval_of(seeds: list[np.ndarray]) -> str:
    """Mean with its 95 % interval: resampled over prompts, and over seeds if there are several."""
    values, rng = np.array(seeds), np.random.default_rng(0)
    count, prompts = values.shape
    means = [values[rng.integers(0, count, count)][:, rng.integers(0, prompts, prompts)].mean() for _ in range(1000)]
    low, high = np.quantile(means, (0.025, 0.975))
    digits = 1 if values.mean() > 1 else 3
    return f"{values.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def draw(measured: dict[Key, Measured], best: dict[int, dict[str, float]], picture: str) -> None:
    """Both judges side by side: a dot per run, a line per method through its betas' means."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for judge, axes in zip((TRUE, INDEPENDENT), figure.subplots(1, 2), strict=True):
        start = measured[REFERENCE, 0.0, 0].rewards[judge].mean()
        for number, method in enumerate(METHODS):
            runs = {beta: [measured[method.name, beta, seed] for seed in SEEDS] for beta in method.betas}
            dots = [(run.kl.mean(), run.rewards[judge].mean()) for found in runs.values() for run in found]
            axes.plot(*zip(*dots, strict=True), "o", color=f"C{number}", markersize=4, alpha=0.6)
            means = [(np.mean([run.kl.mean() for run in found]), np.mean([run.rewards[judge].mean() for run in found])) for found in runs.values()]  # fmt: skip
            line = [(0.0, start), *sorted(means)]
            axes.plot(*zip(*line, strict=True), color=f"C{number}", linewidth=1.2, label=method.name)
        axes.plot(
            *zip(*((one["kl"], one[judge]) for one in best.values()), strict=True),
            "k^--",
            markersize=4,
            linewidth=1,
            label="best of n",
        )
        axes.set_xlabel("KL(policy || reference), nats per response")
        axes.set_ylabel(f"reward, {judge}" + (" (made the pairs)" if judge == TRUE else " (independent)"))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    with mpl.rc_context({"svg.hashsalt": "refscore"}):
        figure.savefig(picture, metadata={"Date": None, "Creator": None})


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(name: str, rows: list[dict[str, Any]]) -> None:
    (DIRECTORY / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
