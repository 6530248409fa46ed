"""What people's votes say: of the policy, of each other, and of the automatic judges: which of them deserves trust."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts.runs import Run
from pipeline.artifacts.schemas import JUDGEMENTS, SAMPLES
from pipeline.artifacts.tables import read_groups, read_table
from pipeline.config.judges import HUMAN
from pipeline.evaluation.rates.agreement import Agreement, Voice, agreement, voice
from pipeline.evaluation.rates.statistics import wilson
from pipeline.evaluation.rates.winrates import win_rate
from pipeline.evaluation.votes.people import in_order, judged_by_people, texts_of, votes_in
from pipeline.evaluation.votes.record import Given, votes_here
from pipeline.evaluation.votes.voices import voices, without_people
from pipeline.judges.judging import Comparison, Judgement, Prompt, Response

# comparisons of a topic from which on its agreement is given
_ENOUGH = 20


def vote_figures(run: Run, model: str = "policy", baseline: str = "reference") -> dict[str, Any]:
    """The figures of people's votes on `model` against `baseline`, as plain values for JSON; intervals as {mean, low, high, ...}.

    `voters`: by voter, most votes first. `people`: how much was voted on, None before the first vote; `human`: the win rate of
    the majority, None likewise. `judges`: agreement of `human` with every automatic judge of the run, the one that deserves most
    trust first: by the lower end of kappa's interval. `between`: agreement of every two voters. Only what was voted on is read
    into memory. Raises DataError if a file of votes, or a table, cannot be read.
    """
    every = votes_here(run)
    comparisons, prompts, differing = _voted_on(run, every, model, baseline)
    there, models = {texts_of(item) for item in comparisons}, {model, baseline}
    # what was said of other models is not said of responses that are gone
    kept = {
        voter: [vote for vote in votes if {vote.model, vote.baseline} == models or in_order(vote.texts) in there]
        for voter, votes in every.items()
    }
    given = {voter: votes for voter, votes in kept.items() if votes}
    judged, people = judged_by_people(given, comparisons)
    if people is not None:
        people = replace(people, of_prompts=prompts, of_comparisons=differing)
    rate = win_rate(judged)
    said = voices([*_judgements_of(run, comparisons, model, baseline), *judged], comparisons, {})
    human = next((one for one in said if one.name == HUMAN), None)
    topics = {item.prompt.text.strip(): item.prompt.topic for item in comparisons}
    return {
        "model": model,
        "baseline": baseline,
        "prompts": prompts,
        "comparisons": differing,
        "people": None if people is None else asdict(people),
        "human": None if rate is None else asdict(rate),
        "voters": sorted((_of_voter(*one, model) for one in given.items()), key=lambda row: -row["votes"]),
        "judges": []
        if human is None
        else _trusted_first(_against(human, one, topics) for one in said if one is not human),
        "between": _between_voters(given),
    }


def _voted_on(
    run: Run, given: Mapping[str, Sequence[Given]], model: str, baseline: str
) -> tuple[list[Comparison], int, int]:
    """The comparisons of prompts that somebody voted on; of all prompts, how many there are; of all comparisons, how many are of
    responses that differ.
    """
    wanted = pa.array({vote.prompt for votes in given.values() for vote in votes}, pa.string())
    rows: dict[str, dict[tuple[str, int], dict[str, Any]]] = {model: {}, baseline: {}}
    responses: dict[str, dict[tuple[str, int], int]] = {model: {}, baseline: {}}
    for group in read_groups(run.samples, SAMPLES, ["prompt_id", "sample", "model", "topic", "prompt", "response"]):
        for name in (model, baseline):
            own = group.filter(pc.equal(group["model"], name))
            keys = zip(own["prompt_id"].to_pylist(), own["sample"].to_pylist(), strict=True)
            texts = own["response"].to_pylist()
            responses[name].update((key, hash(text.strip())) for key, text in zip(keys, texts, strict=True))
            for row in own.filter(pc.is_in(own["prompt"], value_set=wanted)).to_pylist():
                rows[name][row["prompt_id"], row["sample"]] = row
    comparisons = [
        Comparison(
            Prompt(row["prompt_id"], row["prompt"], row["topic"] or ""),
            row["sample"],
            model,
            baseline,
            Response(row["response"].strip(), ""),
            Response(rows[baseline][key]["response"].strip(), ""),
        )
        for key, row in rows[model].items()
        if key in rows[baseline]
    ]
    both = responses[model].keys() & responses[baseline].keys()
    differing = sum(responses[model][key] != responses[baseline][key] for key in both)
    return comparisons, len({prompt_id for prompt_id, _ in both}), differing


def _judgements_of(run: Run, comparisons: Sequence[Comparison], model: str, baseline: str) -> list[Judgement]:
    """What automatic judges said of these; none before the first evaluation."""
    if not comparisons or not run.judgements.is_file():
        return []
    wanted = pa.array({item.prompt.prompt_id for item in comparisons}, pa.string())
    table = read_table(run.judgements, JUDGEMENTS, [name for name in JUDGEMENTS.names if name != "words"])
    voted = table.filter(pc.is_in(table["prompt_id"], value_set=wanted))
    found = [Judgement(**row) for row in voted.to_pylist() if (row["model"], row["baseline"]) == (model, baseline)]
    return without_people(found)


def _of_voter(voter: str, given: Sequence[Given], model: str) -> dict[str, Any]:
    decided = [vote for vote in given if vote.choice in ("first", "second")]
    firsts = sum(vote.choice == "first" for vote in decided)
    took = [vote.seconds for vote in given if vote.seconds is not None]
    return {
        "voter": voter,
        "votes": sum(vote.choice != "skip" for vote in given),
        "ties": sum(vote.choice == "tie" for vote in given),
        "skips": sum(vote.choice == "skip" for vote in given),
        "first_share": asdict(wilson(firsts, len(decided))) if decided else None,
        "wins": sum((vote.choice == "first") == vote.first_is_model for vote in decided if vote.model == model),
        "losses": sum((vote.choice == "first") != vote.first_is_model for vote in decided if vote.model == model),
        "notes": sum(bool(vote.note) for vote in given),
        "seconds": float(np.median(took)) if took else None,
        "last": max((vote.time for vote in given), default=""),
    }


def _against(human: Voice, judge: Voice, topics: Mapping[str, str]) -> dict[str, Any]:
    found = agreement(human, judge)
    by_topic: dict[str, Any] = {}
    groups: dict[str, set[tuple[str, str, str]]] = defaultdict(set)
    for texts in human.scores.keys() & judge.scores.keys():
        groups[topics.get(texts[0], "")].add(texts)
    for topic, common in sorted(groups.items()):
        if len(groups) > 1 and len(common) >= _ENOUGH:
            by_topic[topic] = _figures(agreement(_only(human, common), judge))
    return {"judge": judge.name, **_figures(found), "topics": by_topic}


def _only(one: Voice, texts: set[tuple[str, str, str]]) -> Voice:
    return replace(one, scores={key: score for key, score in one.scores.items() if key in texts})


def _between_voters(given: Mapping[str, Sequence[Given]]) -> list[dict[str, Any]]:
    people = [voice(voter, votes_in(votes)) for voter, votes in given.items()]
    return [
        {"first": one.name, "second": other.name, **_figures(agreement(one, other))}
        for one, other in combinations(people, 2)
    ]


def _figures(found: Agreement | None) -> dict[str, Any]:
    """Of two voices; zeros and nothing if they judged no comparison in common."""
    if found is None:
        return {"prompts": 0, "comparisons": 0, "same": None, "decided": None, "kappa": None}
    intervals = {"same": found.same, "decided": found.decided, "kappa": found.kappa}
    return {
        "prompts": found.prompts,
        "comparisons": found.comparisons,
        **{name: None if interval is None else asdict(interval) for name, interval in intervals.items()},
    }


def _trusted_first(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """By the lower end of kappa's interval; those whose kappa is not known last."""
    return sorted(rows, key=lambda row: (row["kappa"] is None, -(row["kappa"] or {"low": 0.0})["low"], row["judge"]))
