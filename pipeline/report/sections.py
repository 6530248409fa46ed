"""The tables of a report, declared once: terminal, Markdown and HTML render the same sections in the same order."""

from __future__ import annotations

from pipeline.config.judges import IMPLICIT
from pipeline.evaluation.rates.statistics import Interval
from pipeline.evaluation.rates.winrates import WinRate
from pipeline.evaluation.results import Baselines, Results
from pipeline.report.cost_sections import cost_sections
from pipeline.report.table import Cell, Section, between

_RATE = [
    "prompts",
    "win rate",
    "95 % interval",
    "won / tied / lost",
    "at equal length",
    "flipped",
    "failed",
    "sign test p",
]


def sections(results: Results) -> list[Section]:
    """The sections of one evaluation; those without a row are left out."""
    every = [
        _policy(results),
        _baselines(results),
        _endings(results),
        _others(results),
        *_ratings(results),
        _topics(results),
        *cost_sections(results),
        _responses(results),
        _judge_costs(results),
    ]
    return [section for section in every if section.rows]


def _policy(results: Results) -> Section:
    return Section(
        "Policy against reference",
        ["judge", *_RATE],
        [[name, *_rate(rate)] for name, rate in results.judged.items()],
        "Every comparison is judged in both orders; a judge that contradicts itself is counted as flipped. That is a tie, "
        "unless the judge gives probabilities: their log-odds are averaged over both orders. Ties count half. Intervals are "
        "over prompts: a bootstrap, or Wilson's for few prompts or near-unanimous judges. implicit "
        "asks whether training moved the policy towards the chosen response of held-out pairs.",
        "win_rates",
    )


def _baselines(results: Results) -> Section:
    return Section(
        "Without any training",
        [
            "judge",
            "policy",
            "shorter wins",
            "longer wins",
            "first sentence",
            "whole sentences",
            "shuffled",
        ],
        [
            [name, f"{results.judged[name].rate.mean:.2f}", *_baseline_row(name, baselines, results.judged[name].rate)]
            for name, baselines in results.baselines.items()
            if name in results.judged
        ],
        "What trivial baselines reach by the same judges, computed without a model; coloured if it is more than the policy. The "
        "shorter and the longer: of the two responses that were compared, by tokens; for implicit: of the held-out pair, as a "
        "guess at which one was chosen. The reference cut to its first sentence, or to its whole sentences, is compared with "
        "itself uncut; judges that are models are not asked about that. Shuffled: the held-out pairs with shuffled labels. "
        "The picture, drawn if lengths differ, shows what the policy gained by the first judge of texts, prompt by prompt, "
        "against how much longer it is.",
        "length",
    )


def _baseline_row(name: str, baselines: Baselines, policy: Interval) -> list[str | Cell]:
    asked = name == IMPLICIT or baselines.first_sentence or baselines.whole_sentences
    cells = [baselines.shorter, baselines.longer]
    cuts: list[str | Cell] = [
        _baseline(rate, policy) if asked else "not asked"
        for rate in (baselines.first_sentence, baselines.whole_sentences)
    ]
    return [*(_baseline(rate, policy) for rate in cells), *cuts, _baseline(baselines.shuffled, policy)]


def _baseline(rate: Interval | None, policy: Interval) -> str | Cell:
    if rate is None:
        return "-"
    return Cell(f"{rate.mean:.2f} ({between(rate, 2)})", "down" if rate.mean > policy.mean else "")


def _endings(results: Results) -> Section:
    """Judges in whose comparisons both kinds occur; where all ended, or none, there is nothing to tell apart."""
    return Section(
        "Win rates by how responses ended",
        ["judge", "responses", "prompts", "comparisons", "win rate", "95 % interval"],
        [
            [name, kind, str(split.prompts), str(split.comparisons), f"{split.rate.mean:.3f}", between(split.rate)]
            for name, splits in results.endings.items()
            if len(splits) > 1
            for kind, split in splits.items()
        ],
        "Comparisons in which both responses were ended by their models, and those in which one or both were cut off at the "
        "longest allowed length: a policy that only learned to stop wins the latter.",
    )


def _others(results: Results) -> Section:
    return Section(
        "Other models",
        ["judge", "model", "against", *_RATE],
        [
            [comparison.judge, comparison.model, comparison.baseline, *_rate(comparison.rate)]
            for comparison in results.others
            if comparison.rate
        ],
    )


def _ratings(results: Results) -> list[Section]:
    return [
        Section(
            f"Bradley-Terry ratings by {judge}",
            ["model", "log-odds over the reference", "95 % interval"],
            [
                [name, f"{rating.mean:+.2f}", f"{rating.low:+.2f} to {rating.high:+.2f}"]
                for name, rating in rated.items()
            ],
            "A difference of 1 means odds of 2.7 to 1. The reference stands at 0.",
        )
        for judge, rated in results.ratings.items()
    ]


def _topics(results: Results) -> Section:
    """Topics down, judges across; judges that saw one topic only are left out."""
    by_judge = {name: topics for name, topics in results.topics.items() if len(topics) > 1}
    names = sorted({topic for topics in by_judge.values() for topic in topics})
    return Section(
        "By topic",
        ["topic", *by_judge],
        [[topic or "none", *(_of_topic(topics.get(topic)) for topics in by_judge.values())] for topic in names],
        "Win rates with Wilson's interval; coloured if the interval leaves one half out. With many topics some will by chance.",
    )


def _of_topic(rate: Interval | None) -> Cell:
    if rate is None:
        return Cell("-")
    tone = "up" if rate.low > 0.5 else "down" if rate.high < 0.5 else ""
    return Cell(f"{rate.mean:.2f} ({rate.low:.2f} to {rate.high:.2f})", tone)


def _responses(results: Results) -> Section:
    return Section(
        "Responses",
        ["model", "responses", "tokens, mean", "95 % interval", "words, mean", "cut off", "repetition", "empty"],
        [
            [
                model,
                str(seen.responses),
                f"{seen.tokens.mean:.1f}",
                between(seen.tokens, 1),
                f"{seen.words:.1f}",
                f"{seen.cut_off:.0%}",
                f"{seen.repetition:.3f}",
                f"{seen.empty:.0%}",
            ]
            for model, seen in results.responses.items()
        ],
    )


def _judge_costs(results: Results) -> Section:
    return Section(
        "What judges took",
        ["judge", "took"],
        [
            [judge, ", ".join(f"{name.replace('_', ' ')} {value:,g}" for name, value in cost.items())]
            for judge, cost in results.judge_costs.items()
        ],
    )


def _rate(rate: WinRate) -> list[str]:
    controlled = rate.length_controlled
    return [
        str(rate.prompts),
        f"{rate.rate.mean:.3f}",
        between(rate.rate),
        f"{rate.wins} / {rate.ties} / {rate.losses}",
        f"{controlled.mean:.3f} ({between(controlled)})" if controlled else "withheld" if rate.length_withheld else "-",
        f"{rate.flips} of {rate.comparisons}",
        str(rate.failed),
        f"{rate.sign_test_p:.2g}",
    ]
