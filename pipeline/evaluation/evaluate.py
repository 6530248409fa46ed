"""Stage three, whole: sample policy, reference and further models on held-out prompts, measure KL, judge, make figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.artifacts.runs import Run, record
from pipeline.artifacts.tables import read_about, write_table
from pipeline.artifacts.writer import one_writer
from pipeline.config.experiment import Config
from pipeline.config.judges import HUMAN, IMPLICIT, JudgeConfig, pair_judge_problem, seen_by
from pipeline.engines.reference import open_for_new
from pipeline.errors import DataError
from pipeline.evaluation.baselines import GainByLength, cut_rates, gain_by_length, needs_no_model
from pipeline.evaluation.candidates import candidates, must_share_vocabulary
from pipeline.evaluation.figures import (
    judge_pairs,
    judge_texts,
    judgements_table,
    results_of,
    worst_first,
)
from pipeline.evaluation.results import Baselines, HeldOut, People, Results, SideBySide
from pipeline.evaluation.samples import comparisons_of, held_out_prompts, shown
from pipeline.evaluation.sampling import make_samples, measure_kl
from pipeline.evaluation.votes.people import judged_by_people
from pipeline.evaluation.votes.record import votes_here
from pipeline.judges.judging import Comparison, Judge, Judgement, Prompt
from pipeline.judges.open import JudgeContext, open_judge
from pipeline.progress import SILENT, Listener


@dataclass(frozen=True)
class Evaluation:
    """What stage three found, still without its words; every comparison with the reference, the policy's worst first; by judge
    what the policy gained against how much longer it is.
    """

    results: Results
    side_by_side: list[SideBySide]
    gains: dict[str, GainByLength]


@one_writer
def evaluate(config: Config, run: Run, listener: Listener = SILENT) -> Evaluation:
    """Generate with each model, measure KL, judge; writes samples, kl and judgements.parquet.

    What people voted on these responses is judged by HUMAN, beside the judges that are configured. Raises DataError without
    held-out pairs or if votes cannot be read, ConfigError if a model or a judge cannot be opened: before anything is generated.
    """
    reference = open_for_new(config.reference, listener)
    models = candidates(config, run, reference)
    names = [model.name for model in models]
    prompts = held_out_prompts(run.scored, config.generate.max_prompts)
    if not prompts:
        raise DataError(
            f"{run.scored} holds no eval {run.scored.stem}, so there is nothing to generate for: "
            "set data.eval_path or data.eval_fraction and run precompute again"
        )
    about = read_about(run.scored)
    on_samples = config.train.on_samples
    maker = read_about(run.rollouts).get("judge") if on_samples else _maker_of_the_pairs(about)
    must_share_vocabulary(models, about.get("vocabulary"))
    # judges are opened before anything is generated: what is wrong with one is said at once
    made_by = (about.get("vocabulary", ""), about.get("template", ""))
    context = JudgeContext(run.verdicts, config.judge, made_by, listener)
    judges = [open_judge(settings, context) for settings in config.judge if settings.kind != IMPLICIT]
    votes_here(run)
    listener.say(f"prompts   {len(prompts)} held out, for {', '.join(names)}")

    # the implicit judge first: vLLM pins this process's threads once it has run
    judgements: list[Judgement] = []
    held_out: HeldOut | None = None
    baselines: dict[str, Baselines] = {}
    for settings in config.judge:
        if settings.kind == IMPLICIT and run.scored != run.pairs:
            listener.say(
                f"judge     {settings.shown} is left out: it compares held-out pairs, and {run.scored.name} holds none"
            )
        elif settings.kind == IMPLICIT:
            judgements, held_out, baselines[settings.shown] = judge_pairs(
                settings.shown, run.pairs, models[0].merged(), config
            )
            listener.say(f"held-out  reward accuracy {held_out.reward_accuracy:.3f} on {held_out.pairs} pairs")

    samples, kl_samples = make_samples(config.generate, reference, run, prompts, models, listener)
    kl = measure_kl(config.generate, reference, run, prompts, models, kl_samples, listener)
    against = "reference" if config.generate.compare == "reference" else None
    comparisons = comparisons_of(samples, prompts, names, against)
    said = _judged(judges, comparisons, kl, prompts, listener)
    people = _ask_people(run, comparisons, said, listener)
    judgements += said.judgements
    free = {settings.shown for settings in config.judge if needs_no_model(settings)}
    against_reference = [item for item in comparisons if (item.model, item.baseline) == ("policy", "reference")]
    baselines |= {judge.name: cut_rates(judge, against_reference) for judge in judges if judge.name in free}
    write_table(run.judgements, judgements_table(judgements))

    side_by_side = worst_first(comparisons, judgements)
    results = results_of(
        models={model.name: model.described for model in models},
        pair_judge=maker,
        learnt_from="samples" if on_samples else "pairs",
        shared=_shared_with_the_maker(config, maker),
        judgements=judgements,
        comparisons=comparisons,
        samples=samples,
        kl=kl,
        rewards=said.rewards,
        judge_costs=said.costs,
        held_out=held_out,
        baselines=baselines,
        people=people,
        worse=side_by_side[:3],
    )
    digests = {model.name: model.digest for model in models}
    record(run, config, "eval", prompts=len(prompts), samples=len(samples), models=digests)
    return Evaluation(results, side_by_side, said.gains)


def _maker_of_the_pairs(about: dict[str, Any]) -> str | None:
    """The judge that made all training pairs, as the rows of their data say; None if they do not, or name several."""
    judges = about.get("judges", {})
    return next(iter(judges)) or None if len(judges) == 1 else None


def _shared_with_the_maker(config: Config, maker: str | None) -> dict[str, list[str]]:
    """Of every judge what its verdicts rest on that those of the judge that made the pairs do too, if both are known."""
    if maker is None:
        return {}
    judge = next((judge for judge in config.judge if judge.shown == maker), None)
    if judge is None and pair_judge_problem(maker):
        return {}  # a label that the data's maker had for it
    made_by = seen_by(judge or JudgeConfig(name=maker))
    seen = {judge.shown: seen_by(judge) for judge in config.judge}
    return {judge: sorted(rests_on & made_by) for judge, rests_on in seen.items() if rests_on is not None and made_by}


@dataclass(frozen=True)
class _Judged:
    judgements: list[Judgement]
    rewards: dict[str, list[float | None]]
    costs: dict[str, dict[str, float]]
    gains: dict[str, GainByLength]


def _judged(
    judges: Sequence[Judge],
    comparisons: Sequence[Comparison],
    kl: pa.Table | None,
    prompts: Sequence[Prompt],
    listener: Listener,
) -> _Judged:
    """What every judge says of the comparisons, and the rewards it gives the responses whose KL is known."""
    judged = _Judged([], {}, {}, {})
    singles = [] if kl is None else shown(kl, prompts)
    for judge in judges:
        said = judge_texts(judge, comparisons, singles)
        judged.judgements.extend(said.judgements)
        judged.gains[judge.name] = gain_by_length(said.judgements, said.margins, comparisons)
        if said.rewards:
            judged.rewards[judge.name] = said.rewards
        if cost := judge.cost():
            judged.costs[judge.name] = cost
        failed = sum(judgement.score is None for judgement in said.judgements)
        listener.say(f"judge     {judge.name}: {len(said.judgements)} verdicts, {failed} failed")
    return judged


def _ask_people(run: Run, comparisons: Sequence[Comparison], judged: _Judged, listener: Listener) -> People | None:
    """Put what people voted on the comparisons beside what judges said; how much that is, None if nobody voted on anything."""
    by_people, people = judged_by_people(votes_here(run), comparisons)
    if people is None:
        return None
    if by_people:
        heard = {one.key for one in by_people}
        voted_on = [item for item in comparisons if item.key in heard]
        judged.judgements.extend(by_people)
        judged.gains[HUMAN] = gain_by_length(by_people, [], voted_on)
    said = f"{people.votes} votes of {people.voters} people on {people.prompts} of {people.of_prompts} prompts"
    elsewhere = f"; {people.elsewhere} votes are on other responses" if people.elsewhere else ""
    listener.say(f"judge     {HUMAN}: {said}{elsewhere}")
    return people
