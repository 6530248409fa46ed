"""eval.json in words: the outcome in one sentence, what other judges say to it, and what to be careful about."""

from __future__ import annotations

from pipeline.config.judges import HUMAN, IMPLICIT
from pipeline.evaluation.rates.statistics import Interval
from pipeline.evaluation.rates.winrates import WinRate
from pipeline.evaluation.results import END, Baselines, Cost, Results

_WIDE = 0.05
_MANY_CUT_OFF = 0.1
_MANY_FLIPS = 0.2
_LEANING = 0.1
_MUCH_AT_THE_END = 0.2
# trivial baselines that do better than the policy: by a judge of texts, and by the implicit one
_TRIVIAL = {
    "shorter": "The shorter of the two responses, whoever wrote it, does better by the same judge",
    "longer": "The longer of the two responses, whoever wrote it, does better by the same judge",
    "first_sentence": "The reference cut to its first sentence does better by the same judge",
    "whole_sentences": "The reference cut to whole sentences does better by the same judge",
}
_OF_PAIRS = {
    "shorter": "The guess that the shorter response is the chosen one is right more often",
    "longer": "The guess that the longer response is the chosen one is right more often",
    "shuffled": "Shuffled labels do better",
}


def verdict(results: Results) -> str:
    """The outcome in one sentence, from the first judge of texts; else from the implicit one: it says so if this judge made
    the pairs. A second sentence if something that took no training does better.
    """
    name = leading_judge(results)
    if name is None:
        return "Nothing could be judged."
    seen = results.judged[name]
    against = "an untrained policy on held-out pairs" if name == IMPLICIT else "the reference"
    said = {
        "better": f"The policy is better than {against}",
        "worse": f"The policy is worse than {against}",
        "even": f"No difference to {against} could be shown",
    }[outcome(seen.rate)]
    maker = f", which also {_chose(results)} and so is no independent judge," if name == results.pair_judge else ""
    return " ".join(
        [
            f"{said}: {name}{maker} prefers it on {seen.rate.mean:.0%} of {seen.prompts} prompts ({_between(seen.rate)}).",
            *_surpassed(results, name),
        ]
    )


def _surpassed(results: Results, name: str) -> list[str]:
    """One sentence if a trivial baseline has a higher rate than the policy by this judge: the highest one."""
    policy = results.judged[name].rate
    known = {
        what: rate
        for what, rate in vars(results.baselines.get(name, Baselines())).items()
        if rate is not None and rate.mean > policy.mean and "better" in (outcome(policy), outcome(rate))
    }
    if not known:
        return []
    best = max(known, key=lambda what: known[what].mean)
    what = (_OF_PAIRS if name == IMPLICIT else _TRIVIAL)[best]
    unit = "held-out pairs" if best == "shuffled" else "prompts"
    return [f"{what}: {_share(known[best], unit)} ({_between(known[best])})."]


def leading_judge(results: Results) -> str | None:
    """The judge that the verdict follows: the first of texts that judged anything, else the implicit one."""
    texts = [name for name in results.judged if name != IMPLICIT]
    return next(iter(texts or results.judged), None)


def outcome(rate: Interval) -> str:
    """One of better, worse and even, by whether the interval holds one half."""
    return "better" if rate.low > 0.5 else "worse" if rate.high < 0.5 else "even"


def notes(results: Results) -> list[str]:
    """What other judges say to the verdict, then what to be careful about."""
    return [*second_opinions(results), *cautions(results)]


def second_opinions(results: Results) -> list[str]:
    """A sentence for every further judge: does it agree with the one that leads? Judges that made the pairs are named."""
    leading = leading_judge(results)
    if leading is None:
        return []
    led = outcome(results.judged[leading].rate)
    sentences = []
    if leading == results.pair_judge:
        if len(results.judged) > 1:
            sentences.append(f"{leading} also {_chose(results)}: weigh the other judges more.")
    elif independence := _independence(results, leading):
        sentences.append(f"{leading} {independence.strip(', ').removeprefix('which ')}.")
    for name, rate in results.judged.items():
        if name == leading:
            continue
        who_won = outcome(rate.rate)
        says = (
            "agrees"
            if who_won == led
            else "shows no difference"
            if who_won == "even"
            else "sees a difference where none was shown"
            if led == "even"
            else "disagrees"
        )
        counted = f"{'held-out pairs of ' if name == IMPLICIT else ''}{rate.prompts} prompts"
        sentences.append(
            f"{name}{_independence(results, name)} {says}: {rate.rate.mean:.0%} of {counted} ({_between(rate.rate)})."
        )
        sentences += [f"{name}: {sentence[0].lower()}{sentence[1:]}" for sentence in _surpassed(results, name)]
    return sentences


def _independence(results: Results, name: str) -> str:
    """What a judge has to do with the one that made the pairs, as an insertion; empty if it is not known."""
    if name == results.pair_judge:
        return f", which {_chose(results)},"
    if name not in results.shared:
        return ""
    if shared := results.shared[name]:
        return f", which uses {' and '.join(shared)} as the judge that {_made(results)} does,"
    return f", which uses nothing that the judge that {_made(results)} does,"


def _chose(results: Results) -> str:
    """What the judge has done whose preferences the policy learnt."""
    return "rewarded the training samples" if results.learnt_from == "samples" else "chose the training pairs"


def _made(results: Results) -> str:
    return "rewarded the samples" if results.learnt_from == "samples" else "made the pairs"


def cautions(results: Results) -> list[str]:
    """What could mislead a reader of these figures, each with its number."""
    leading = leading_judge(results)
    if leading is None:
        return []
    sentences = []
    rate = results.judged[leading]
    if rate.rate.half_width > _WIDE and rate.detectable:
        needed = f"; {rate.prompts_needed:,} would show 5 points" if rate.prompts_needed else ""
        sentences.append(
            f"The interval is wide. {rate.prompts} prompts show a difference of {100 * rate.detectable:.0f} points "
            f"four times in five{needed}."
        )
    for name, seen in results.judged.items():
        sentences += _of_judge(name, seen)
    sentences += _of_people(results)
    sentences += [*_withheld(results), *_cut_off(results), *_by_ending(results, leading), *_in_the_end(results)]
    policy, reference = (results.responses.get(name) for name in ("policy", "reference"))
    if policy and reference:
        longer = policy.words / max(1e-9, reference.words)
        if not 0.67 < longer < 1.5:
            sentences.append(
                f"The policy's responses are {longer:.2f} times as long as the reference's "
                f"({policy.words:.0f} against {reference.words:.0f} words). "
                + (
                    "The rates at equal length take that out."
                    if rate.length_controlled
                    else "What is due to length cannot be told apart."
                    if rate.length_withheld
                    else "The lengths hardly overlap, so what is due to length cannot be told apart."
                )
            )
    return sentences


def _cut_off(results: Results) -> list[str]:
    """Every model counts: a reference that was cut off loses to one that only learned to stop."""
    shares = {name: (seen.cut_off, seen.responses) for name, seen in results.responses.items()}
    if shares and min(shares.values())[0] == 1.0:
        every = sum(number for _, number in shares.values())
        nobody = f"No response was ended by its model: all {every} were written to the longest allowed length"
        return [f"{nobody}, so there is no win rate of those that ended."]
    return [
        f"{share:.0%} of the {number} responses of {name} were cut off at the longest allowed length."
        for name, (share, number) in shares.items()
        if share > _MANY_CUT_OFF
    ]


def _by_ending(results: Results, leading: str) -> list[str]:
    """A sentence if the outcome is another one where both responses ended by themselves."""
    splits = results.endings.get(leading, {})
    if len(splits) < 2:
        return []
    ended, others = splits["both ended"], splits["some cut off"]
    if outcome(ended.rate) == outcome(results.judged[leading].rate):
        return []
    said = f"Where both responses ended by themselves, {leading} prefers the policy on {ended.rate.mean:.0%} of {ended.prompts}"
    beside = f"where one was cut off, on {others.rate.mean:.0%} of {others.prompts} ({_between(others.rate)})"
    return [f"{said} prompts ({_between(ended.rate)}); {beside}."]


def _in_the_end(results: Results) -> list[str]:
    """A sentence if much of the policy's KL lies in the token that ends a response: it learned to stop."""
    positions = results.cost.get("policy", Cost()).positions
    whole, at_end = (
        sum(one.sampled for one in positions if all_of_it or one.where == END) for all_of_it in (True, False)
    )
    if whole <= 0 or at_end / whole < _MUCH_AT_THE_END:
        return []
    return [f"{at_end / whole:.0%} of the policy's KL lies in the token that ends a response."]


def _of_judge(name: str, seen: WinRate) -> list[str]:
    sentences = []
    if seen.failed:
        sentences.append(
            f"{name} failed on {seen.failed} of {seen.comparisons} comparisons; had all of them been lost or won, its rate would "
            f"be {seen.worst:.0%} or {seen.best:.0%}."
        )
    if seen.comparisons and seen.flips / seen.comparisons > _MANY_FLIPS:
        sentences.append(
            f"{name} contradicted itself on {seen.flips} of {seen.comparisons} comparisons when the order changed."
        )
    if seen.first_wins is not None and abs(seen.first_wins - 0.5) > _LEANING:
        sentences.append(
            f"{name} prefers the response that stands first in {seen.first_wins:.0%} of its verdicts on {seen.comparisons} "
            "comparisons."
        )
    controlled = seen.length_controlled
    if controlled and outcome(controlled) != outcome(seen.rate):
        sentences.append(
            f"{name}: at equal length the rate on {seen.prompts} prompts would be {controlled.mean:.0%} "
            f"({_between(controlled)}), so length explains part of the outcome."
        )
    return sentences


def _of_people(results: Results) -> list[str]:
    """How many people voted on how much, and what of it is on responses that are gone."""
    people = results.people
    if people is None:
        return []
    sentences = []
    if people.votes:
        who = "one person prefers" if people.voters == 1 else f"most of {people.voters} people prefer"
        sentences.append(f"{HUMAN} is what {who}, on {people.prompts} of {people.of_prompts} prompts.")
    if people.elsewhere:
        votes = "One vote is" if people.elsewhere == 1 else f"{people.elsewhere} votes are"
        sentences.append(f"{votes} on other responses, and counted for nothing.")
    return sentences


def _withheld(results: Results) -> list[str]:
    """One sentence per reason: judges of the same responses mostly share it."""
    judges: dict[str, list[str]] = {}
    for name, seen in results.judged.items():
        if seen.length_withheld:
            judges.setdefault(seen.length_withheld, []).append(name)
    return [
        f"No rate at equal length is given for {', '.join(names)}, because {reason}."
        for reason, names in judges.items()
    ]


def _share(interval: Interval, unit: str) -> str:
    return f"{interval.mean:.0%}" + ("" if interval.n is None else f" of {interval.n} {unit}")


def _between(interval: Interval) -> str:
    return f"95 % interval {interval.low:.0%} to {interval.high:.0%}"
