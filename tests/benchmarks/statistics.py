"""`make bench-statistics`: what intervals and tests of stage three promise, and what simulations say they keep.

Simulated judges with a known truth, no model. "before" is what stood there earlier: a percentile bootstrap, an exact sign test,
ties for contradictions, no correction of intervals, no check of the curve of length. `--runs` is the number of simulated
evaluations behind a figure; a share near 0.95 of 300 is known within 0.025.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import combinations
from unittest import mock

import numpy as np
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from pipeline.artifacts.markdown import markdown_table
from pipeline.evaluation.rates import length_control
from pipeline.evaluation.rates.length_control import length_controlled, withheld
from pipeline.evaluation.rates.paired import Paired, paired
from pipeline.evaluation.rates.seeds import over_seeds
from pipeline.evaluation.rates.statistics import Interval, bootstrap_mean, share, sign_test, wilson
from pipeline.evaluation.rates.winrates import both_orders, comparison_scores, prompt_scores
from tests.benchmarks.simulated_judges import DIFFERENCES, RATES, chance, leaning_judgements, length_judge, seeds_of

_PROMPTS = (10, 20, 50, 200)


def rates(runs: int) -> list[list[str]]:
    rows = []
    for name, (truth, draw) in RATES.items():
        for number in _PROMPTS:
            rng = np.random.default_rng(0)
            held = {"bootstrap": 0, "share": 0, "wilson": 0, "exact": 0}
            for _ in range(runs):
                scores = draw(rng, number).tolist()
                exact = proportion_confint(sum(scores), number, method="beta")
                held["bootstrap"] += _holds(bootstrap_mean(scores), truth)
                held["share"] += _holds(share(scores)[0], truth)
                held["wilson"] += _holds(wilson(sum(scores), number), truth)
                held["exact"] += _holds(Interval(truth, *map(float, np.nan_to_num(exact, nan=1.0))), truth)
            rows.append([name, str(number), *(_share(count, runs) for count in held.values())])
    return rows


def pairs(runs: int) -> list[list[str]]:
    """Coverage, widths of zero and contradictions between interval and test, of the bootstrap and of `paired`."""
    rows = []
    for name, (truth, draw) in DIFFERENCES.items():
        for number in _PROMPTS:
            rng = np.random.default_rng(1)
            count = np.zeros(7, dtype=int)
            for _ in range(runs):
                differences = draw(rng, number)
                before, p = bootstrap_mean(differences.tolist()), _sign_test(differences)
                now = compared(differences)
                t = stats.t.interval(0.95, number - 1, differences.mean(), max(1e-12, stats.sem(differences)))
                found = [_holds(before, truth), _holds(Interval(0, *t), truth), _holds(now.difference, truth)]
                found += [before.half_width == 0, now.difference.half_width == 0]
                found += [_leaves_out(before) != (p <= 0.05), _leaves_out(now.difference) != (now.p <= 0.05)]
                count += found
            rows.append([name, str(number), *(_share(value, runs) for value in count)])
    return rows


def tests(runs: int) -> list[list[str]]:
    """How often a difference is claimed: 0.05 promised if there is none; the more the better if there is one."""
    rows = []
    for gain in (0.0, 0.1, 0.2):
        for number in _PROMPTS:
            rng = np.random.default_rng(2)
            claimed = np.zeros(4, dtype=int)
            for _ in range(runs):
                verdicts = rng.choice([0.0, 1.0, -1.0], number, p=[0.5, 0.25 + gain / 2, 0.25 - gain / 2])
                probabilities = np.clip(rng.normal(gain / 2, 0.2, number), -1, 1)
                claimed += [
                    claim
                    for differences in (verdicts, probabilities)
                    for claim in (_sign_test(differences) <= 0.05, compared(differences).p <= 0.05)
                ]
            rows.append([f"{gain:.1f} / {gain / 2:.2f}", str(number), *(_share(count, runs) for count in claimed)])
    return rows


def soft_judges(runs: int) -> list[list[str]]:
    """Claims on 100 prompts by a judge that gives probabilities and leans to the first position by so many log-odds."""
    rows = []
    for gain in (0.0, 0.3):
        for leaning in (0.0, 1.0, 2.0):
            rng = np.random.default_rng(3)
            claimed = {comparison_scores: 0, both_orders: 0}
            flips = 0
            for _ in range(runs):
                said = leaning_judgements(rng, 100, gain, leaning)
                flips += sum(one.flipped for one in both_orders(said).values())
                for combine in claimed:
                    scores = list(prompt_scores(combine(said)).values())
                    claimed[combine] += _leaves_out(share(scores)[0], 0.5)
            counts = [_share(count, runs) for count in claimed.values()]
            rows.append([f"{gain}", f"{leaning}", _share(flips, 100 * runs), *counts])
    return rows


def sweeps(runs: int) -> list[list[str]]:
    """Sweeps of equal policies on 77 prompts: some interval leaves out 0; 0.05 promised of the whole sweep."""
    rows = []
    for policies in (3, 5, 10):
        rng = np.random.default_rng(4)
        number = policies * (policies - 1) // 2
        some = np.zeros(2, dtype=int)
        made = max(1, runs // (4 if policies == 10 else 1))
        for _ in range(made):
            scores = rng.choice([0.0, 0.5, 1.0], (policies, 77), p=[0.4, 0.2, 0.4])
            differences = [scores[a] - scores[b] for a, b in combinations(range(policies), 2)]
            some += [
                any(_leaves_out(bootstrap_mean(one.tolist())) for one in differences),
                any(_leaves_out(compared(one, number).difference) for one in differences),
            ]
        rows.append([str(policies), str(number), str(made), *(_share(count, made) for count in some)])
    return rows


def methods(runs: int) -> list[list[str]]:
    """Claims of a difference of two methods on 100 prompts, their seeds' means varying by 0.05."""
    rows = []
    for gain in (0.0, 0.1, 0.2):
        for seeds in (2, 3, 5):
            rng = np.random.default_rng(5)
            claimed = np.zeros(3, dtype=int)
            for _ in range(runs):
                sides = [seeds_of(rng, mean, seeds, 0.05) for mean in (0.5 + gain, 0.5)]
                gaps = np.array([[np.mean([one[n] for one in side]) for n in side[0]] for side in sides])
                found = over_seeds(sides[0], sides[1])
                assert found is not None
                claimed += [compared(gaps[0] - gaps[1]).p <= 0.05, found.p <= 0.05, _holds(found.difference, gain)]
            rows.append([f"{gain}", str(seeds), *(_share(count, runs) for count in claimed)])
    return rows


def lengths(runs: int) -> list[list[str]]:
    """The rate at equal length of 300 prompts: `bend` is how much earlier than the model's curve the judge's bends."""
    rows = []
    for soft in (False, True):
        for bend in (1.0, 4.0, 10.0):
            truth = float(np.mean(chance(0.5 + 0.3 * np.random.default_rng(0).normal(size=100_000) * soft)))
            refused = sum(bool(withheld(*length_judge(seed, bend, soft=soft))) for seed in range(runs))
            shown: list[tuple[Interval, bool]] = []
            for seed in range(max(1, runs // 3)):
                with mock.patch.object(length_control, "_MISTAKEN", -1.0):
                    figure = length_controlled(*length_judge(seed, bend, soft=soft))
                if figure:
                    shown.append((figure, not withheld(*length_judge(seed, bend, soft=soft))))
            after = [figure for figure, kept in shown if kept]
            bias = np.mean([figure.mean - truth for figure, _ in shown])
            before, now = (sum(_holds(figure, truth) for figure in held) for held in ([one for one, _ in shown], after))
            row = ["probabilities" if soft else "verdicts", f"{bend:.0f}", f"{bias:+.3f}", _share(before, len(shown))]
            rows.append([*row, _share(refused, runs), f"{_share(now, len(after))} of {len(after)}"])
    return rows


def compared(differences: np.ndarray, comparisons: int = 1) -> Paired:
    """`paired` of two policies with these differences."""
    first = {str(n): float(one) for n, one in enumerate(differences)}
    found = paired(first, dict.fromkeys(first, 0.0), comparisons)
    assert found is not None
    return found


def _sign_test(differences: np.ndarray) -> float:
    return sign_test(int((differences > 0).sum()), int((differences < 0).sum()))


def _holds(interval: Interval, truth: float) -> bool:
    # a last bit is no miss
    return interval.low - 1e-9 <= truth <= interval.high + 1e-9


def _leaves_out(interval: Interval, value: float = 0.0) -> bool:
    return not interval.low <= value <= interval.high


def _share(count: int, number: int) -> str:
    return f"{count / number:.3f}" if number else "-"


TABLES: dict[str, tuple[list[str], Callable[[int], list[list[str]]]]] = {
    "Win rates: share of intervals that hold the truth, 0.95 promised": (
        ["scores", "prompts", "bootstrap", "shown", "Wilson", "Clopper-Pearson"], rates,
    ),
    "Paired differences: intervals that hold the truth, 0.95 promised; zero width; interval and p that contradict": (
        ["difference", "prompts", "before", "Student's t", "now", "no width before", "now", "contradicts before", "now"],
        pairs,
    ),
    "Paired differences: how often one is claimed, at most 0.05 promised of no difference": (
        ["gain, verdicts / probabilities", "prompts", "verdicts before", "now", "probabilities before", "now"], tests,
    ),
    "Soft judges, 100 prompts: how often a difference is claimed": (
        ["gain, log-odds", "leaning, log-odds", "flipped", "before", "now"], soft_judges,
    ),
    "Sweeps of equal policies, 77 prompts: some interval leaves out 0, 0.05 promised": (
        ["policies", "comparisons", "sweeps", "before", "now"], sweeps,
    ),
    "Methods of several seeds, 100 prompts, means of seeds vary by 0.05: how often a difference is claimed": (
        ["gain", "seeds of each", "prompts alone", "seeds and prompts", "its interval holds the truth"], methods,
    ),
    "Rate at equal length, 300 prompts: 0.95 promised": (
        ["judge", "bends earlier by", "bias", "held before", "withheld now", "held of those shown"], lengths,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=300, help="simulated evaluations behind a figure")
    runs = parser.parse_args().runs
    for title, (head, table) in TABLES.items():
        print(f"\n{title}\n\n{markdown_table(head, table(runs))}", flush=True)


if __name__ == "__main__":
    main()
