"""The tables of what training cost: KL to the reference as a whole, by each estimate, by position."""

from __future__ import annotations

from pipeline.evaluation.results import Cost, Position, Results
from pipeline.report.table import Cell, Section, between, with_interval


def cost_sections(results: Results) -> list[Section]:
    """The whole, then the estimates, then where it lies."""
    return [_whole(results), _estimates(results), _positions(results)]


def _whole(results: Results) -> Section:
    judges = list(dict.fromkeys(judge for cost in results.cost.values() for judge in cost.reward))
    return Section(
        "KL to the reference",
        [
            "model",
            "nats per response",
            "95 % interval",
            "nats per token",
            "responses",
            "perplexity",
            *(f"reward, {name}" for name in judges),
        ],
        [[model, *_cost_row(cost, judges)] for model, cost in results.cost.items()],
        "KL(model || reference) on the model's own responses at temperature 1, scored by stage one's scorer under both models. "
        "Perplexity: of these responses under the reference, whose own show what it finds fluent; far above, fluency was lost.",
        "frontier",
        "kl.parquet, model as named; rewards are not kept",
    )


def _cost_row(cost: Cost, judges: list[str]) -> list[str | Cell]:
    kl = ["0", "-", "-", "-"]
    if cost.kl is not None:
        kl = [f"{cost.kl.mean:.2f}", between(cost.kl, 2), f"{cost.per_token:.4f}", str(cost.responses)]
    kl.append("-" if cost.perplexity is None else f"{cost.perplexity:.1f}")
    rewards = [cost.reward.get(judge) for judge in judges]
    return [*kl, *("-" if interval is None else with_interval(interval) for interval in rewards)]


def _estimates(results: Results) -> Section:
    return Section(
        "KL by three estimates",
        ["model", "estimate", "nats per response", "95 % interval", "standard error", "gain in variance"],
        [
            [
                model,
                name,
                f"{estimate.interval.mean:.3f}",
                between(estimate.interval),
                "-" if estimate.standard_error is None else f"{estimate.standard_error:.3f}",
                "-" if estimate.variance_ratio is None else f"{estimate.variance_ratio:.2f}",
            ]
            for model, cost in results.cost.items()
            for name, estimate in cost.estimates.items()
        ],
        "All three estimate the same number without bias; far apart, they say that there are too few samples. Sampled: the "
        "log-ratio of the tokens drawn. Control variate: with r - 1 added, r = reference / model, whose mean is 0. Exact per "
        "position: at every position the mean over all tokens instead of the one drawn. Gain in variance: how many times as "
        "many prompts the sampled estimate needs for the same standard error; below 1 it needs fewer.",
        source="kl.parquet, model as named: logps, ref_logps, exact_kl",
    )


def _positions(results: Results) -> Section:
    return Section(
        "KL by position",
        [
            "model",
            "tokens of the response",
            "number",
            "nats per response",
            "its share",
            "exact per position",
            "share of that",
        ],
        [
            [model, part.where, str(part.tokens), *_position_row(part, cost)]
            for model, cost in results.cost.items()
            for part in cost.positions
        ],
        "Parts of the whole; the token that ends a response stands apart, and is in no other part.",
        source="kl.parquet, model as named: places in logps, ref_logps, exact_kl",
    )


def _position_row(part: Position, cost: Cost) -> list[str]:
    row = [f"{part.sampled:.3f}", _share(part.sampled, sum(one.sampled for one in cost.positions))]
    if part.exact is None:
        return [*row, "-", "-"]
    return [*row, f"{part.exact:.3f}", _share(part.exact, sum(one.exact or 0.0 for one in cost.positions))]


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole > 0 else "-"
