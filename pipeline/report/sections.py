"""The tables of a report, declared once: terminal, Markdown and HTML render the same sections in the same order."""

from __future__ import annotations

from pipeline.config.judges import HUMAN, IMPLICIT
from pipeline.evaluation.rates.statistics import Interval
from pipeline.evaluation.rates.winrates import WinRate
from pipeline.evaluation.results import Baselines, Results
from pipeline.report import addresses
from pipeline.report.cost_sections import cost_sections
from pipeline.report.round_sections import round_section
from pipeline.report.table import BETWEEN, Cell, Section, between, with_interval

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
_COMPARED = "model = policy, baseline = reference"


_OF_PEOPLE = (
    f" {HUMAN} is what most of the people who voted prefer, on the prompts that they voted on. Each saw a comparison in one "
    "order."
)


def sections(results: Results, run: str) -> list[Section]:
    """The sections of one evaluation, their figures with the addresses of their rows in the run of that name; those without a
    row are left out.
    """
    every = [
        _policy(results, run),
        _baselines(results, run),
        _endings(results, run),
        _others(results, run),
        *_ratings(results, run),
        _topics(results, run),
        *cost_sections(results),
        round_section(results, run),
        _responses(results, run),
        _judge_costs(results, run),
    ]
    return [section for section in every if section.rows]


def _policy(results: Results, run: str) -> Section:
    return Section(
        "Policy against reference",
        ["judge", *_RATE],
        [[_judge(run, name), *_rate(rate, run, name)] for name, rate in results.judged.items()],
        "Every comparison is judged in both orders; a judge that contradicts itself is counted as flipped. That is a tie, "
        "unless the judge gives probabilities: their log-odds are averaged over both orders. Ties count half. Won, tied and lost "
        "are prompts, by the mean over their samples; the links list single comparisons. Intervals are "
        "over prompts: a bootstrap, or Wilson's for few prompts or near-unanimous judges. implicit "
        "asks whether training moved the policy towards the chosen response of held-out pairs."
        + (_OF_PEOPLE if HUMAN in results.judged else ""),
        "win_rates",
        f"judgements.parquet, {_COMPARED}, judge as named; for implicit: pairs.parquet, split = eval",
    )


def _judge(run: str, name: str) -> Cell:
    return Cell(name, rows=addresses.judged(run, name))


def _baselines(results: Results, run: str) -> Section:
    return Section(
        "Without any training",
        ["judge", "policy", "shorter wins", "longer wins", "first sentence", "whole sentences", "shuffled"],
        [
            [
                _judge(run, name),
                f"{results.judged[name].rate.mean:.2f}, n = {results.judged[name].prompts}",
                *_baseline_row(name, baselines, results.judged[name].rate),
            ]
            for name, baselines in results.baselines.items()
            if name in results.judged
        ],
        "What trivial baselines reach by the same judges, computed without a model; marked by an arrow if it is more than the "
        "policy. The "
        "shorter and the longer: of the two responses that were compared, by tokens; for implicit: of the held-out pair, as a "
        "guess at which one was chosen. The reference cut to its first sentence, or to its whole sentences, is compared with "
        "itself uncut; judges that are models are not asked about that. Shuffled: the held-out pairs with shuffled labels. "
        "The picture, drawn if lengths differ, shows what the policy gained by the first judge of texts, prompt by prompt, "
        "against how much longer it is.",
        "length",
        f"judgements.parquet, {_COMPARED}, judge as named, and tokens of samples.parquet; cut: samples.parquet, model = reference, "
        "whose verdicts are not kept; for implicit: pairs.parquet, split = eval",
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
    return Cell(with_interval(rate, 2), "above" if rate.mean > policy.mean else "")


def _endings(results: Results, run: str) -> Section:
    """Judges in whose comparisons both kinds occur; where all ended, or none, there is nothing to tell apart."""
    return Section(
        "Win rates by how responses ended",
        ["judge", "responses", "prompts", "comparisons", "win rate", "95 % interval"],
        [
            [
                _judge(run, name),
                kind,
                str(split.prompts),
                str(split.comparisons),
                f"{split.rate.mean:.3f}",
                between(split.rate),
            ]
            for name, splits in results.endings.items()
            if len(splits) > 1
            for kind, split in splits.items()
        ],
        "Comparisons in which both responses were ended by their models, and those in which one or both were cut off at the "
        "longest allowed length: a policy that only learned to stop wins the latter.",
        source=f"judgements.parquet, {_COMPARED}, judge as named; finish_reason of samples.parquet is length if cut off",
    )


def _others(results: Results, run: str) -> Section:
    return Section(
        "Other models",
        ["judge", "model", "against", *_RATE],
        [
            [
                Cell(other.judge, rows=addresses.judged(run, other.judge, other.model, other.baseline)),
                other.model,
                other.baseline,
                *_rate(other.rate, run, other.judge, other.model, other.baseline),
            ]
            for other in results.others
            if other.rate
        ],
        source="judgements.parquet, judge, model and baseline (against) as named",
    )


def _ratings(results: Results, run: str) -> list[Section]:
    return [
        Section(
            f"Bradley-Terry ratings by {judge}",
            ["model", "log-odds over the reference", "95 % interval"],
            [
                [
                    Cell(name, rows=addresses.judged(run, judge, name) if name != "reference" else ""),
                    f"{rating.mean:+.2f}",
                    f"{rating.low:+.2f} to {rating.high:+.2f}",
                ]
                for name, rating in rated.items()
            ],
            "A difference of 1 means odds of 2.7 to 1. The reference stands at 0.",
            source=f"judgements.parquet, judge = {judge}, every model and baseline",
        )
        for judge, rated in results.ratings.items()
    ]


def _topics(results: Results, run: str) -> Section:
    """Topics down, judges across; judges that saw one topic only are left out."""
    by_judge = {name: topics for name, topics in results.topics.items() if len(topics) > 1}
    names = sorted({topic for topics in by_judge.values() for topic in topics})
    return Section(
        "By topic",
        ["topic", *by_judge],
        [
            [topic or "none", *(_of_topic(topics.get(topic), run, judge, topic) for judge, topics in by_judge.items())]
            for topic in names
        ],
        "Win rates with Wilson's interval; marked by an arrow if the interval leaves one half out. With many topics some will "
        "by chance.",
        source=f"judgements.parquet, {_COMPARED}, judge as named, prompts whose topic in samples.parquet is the row's",
    )


def _of_topic(rate: Interval | None, run: str, judge: str, topic: str) -> Cell:
    if rate is None:
        return Cell("-")
    tone = "up" if rate.low > 0.5 else "down" if rate.high < 0.5 else ""
    return Cell(with_interval(rate, 2), tone, addresses.judged(run, judge, topic=topic))


def _responses(results: Results, run: str) -> Section:
    return Section(
        "Responses",
        ["model", "responses", "tokens, mean", "95 % interval", "words, mean", "cut off", "repetition", "empty"],
        [
            [
                Cell(model, rows=addresses.responses(run, model)),
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
        source="samples.parquet, model as named",
    )


def _judge_costs(results: Results, run: str) -> Section:
    return Section(
        "What judges took",
        ["judge", "took"],
        [
            [_judge(run, judge), ", ".join(f"{name.replace('_', ' ')} {value:,g}" for name, value in cost.items())]
            for judge, cost in results.judge_costs.items()
        ],
        source="verdicts/ of the run, judge as named",
    )


def _rate(rate: WinRate, run: str, judge: str, model: str = "policy", baseline: str = "reference") -> list[str | Cell]:
    def rows(outcome: addresses.Outcome, number: int) -> str:
        return addresses.judged(run, judge, model, baseline, outcome=outcome) if number else ""

    controlled = rate.length_controlled
    return [
        str(rate.prompts),
        f"{rate.rate.mean:.3f}",
        between(rate.rate),
        Cell(
            BETWEEN.join(map(str, (rate.wins, rate.ties, rate.losses))),
            rows=[rows("won", rate.wins), rows("tied", rate.ties), rows("lost", rate.losses)],
        ),
        with_interval(controlled) if controlled else "withheld" if rate.length_withheld else "-",
        Cell(f"{rate.flips} of {rate.comparisons}", rows=rows("flipped", rate.flips)),
        Cell(str(rate.failed), rows=rows("failed", rate.failed)),
        f"{rate.sign_test_p:.2g}",
    ]
