"""The voices of a run: every judge of texts that its tables know, and its people as they have voted by now."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.artifacts.runs import Run
from pipeline.artifacts.schemas import JUDGEMENTS, SAMPLES
from pipeline.artifacts.tables import read_table
from pipeline.config.judges import HUMAN
from pipeline.evaluation.rates.agreement import Voice, voice, votes_of
from pipeline.evaluation.results import read_results
from pipeline.evaluation.samples import comparisons_of, held_out_prompts
from pipeline.evaluation.votes.people import judged_by_people
from pipeline.evaluation.votes.record import votes_here
from pipeline.judges.judging import Comparison, Judgement


def voices_of(run: Run) -> list[Voice]:
    """Every judge of texts of a run, with the price of 1,000 comparisons if it had one; people last.

    What people voted since the last evaluation counts too.
    """
    samples = read_table(run.samples, SAMPLES)
    models = list(dict.fromkeys(samples["model"].to_pylist()))
    comparisons = comparisons_of(samples, held_out_prompts(run.scored, None), models)
    judgements = [Judgement(**row) for row in read_table(run.judgements, JUDGEMENTS).to_pylist()]
    by_people, _ = judged_by_people(votes_here(run), comparisons)
    results = read_results(run.eval)
    return voices([*without_people(judgements), *by_people], comparisons, results.judge_costs if results else {})


def without_people(judgements: Iterable[Judgement]) -> list[Judgement]:
    """Those of automatic judges."""
    return [judgement for judgement in judgements if judgement.judge != HUMAN]


def voices(
    judgements: Sequence[Judgement], comparisons: Sequence[Comparison], costs: dict[str, dict[str, float]]
) -> list[Voice]:
    """What each judge of texts said of the comparisons. `costs`: by judge, what its verdicts took."""
    found = []
    for judge, said in votes_of(judgements, comparisons).items():
        price = costs.get(judge, {}).get("price")
        # both orders of a comparison are one
        asked = sum(vote.first != vote.second for vote in said) / 2
        found.append(voice(judge, said, 1000 * price / asked if price and asked else None))
    return found
