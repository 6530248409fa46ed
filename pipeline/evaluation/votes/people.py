"""The votes of all people as one judge: of every comparison that was voted on, what most of them prefer.

A vote counts for the texts it was given on. Comparisons that nobody voted on, or that all skipped, are absent: they are no
failures of this judge and no ties.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pipeline.config.judges import HUMAN
from pipeline.evaluation.results import People
from pipeline.evaluation.votes.record import Given
from pipeline.judges.annotations import Vote
from pipeline.judges.judging import Compared, Comparison, Judgement, majority, winner_of

# the prompt, and both responses in the order of their texts
_Texts = tuple[str, str, str]


def votes_in(given: Iterable[Given]) -> list[Vote]:
    """What one person said, as verdicts of any judge are written; without skips."""
    return [Vote(*vote.texts, vote.score) for vote in given if vote.score is not None]


def judged_by_people(
    given: Mapping[str, Sequence[Given]], comparisons: Sequence[Comparison]
) -> tuple[list[Judgement], People | None]:
    """One judgement by HUMAN of every comparison that has a vote, and how much was voted on; None without any votes but skips.

    `given`: by voter. A judgement's order is the one that most saw, as people are asked in one; its words are their notes. Of a
    voter's votes on the same texts the one on this very comparison counts, else the last. Identical responses are not asked about.
    """
    if not any(vote.score is not None for votes in given.values() for vote in votes):
        return [], None
    asked = [item for item in comparisons if item.response.text != item.against.text]
    finders = [_Finder(votes) for votes in given.values()]
    judgements: list[Judgement] = []
    heard: set[int] = set()
    for item in asked:
        found = {number: vote for number, finder in enumerate(finders) if (vote := finder.find(item)) is not None}
        if found:
            judgements.append(_judgement(item, list(found.values())))
            heard |= found.keys()
    texts = {texts_of(item) for item in asked}
    spoken = [in_order(vote.texts) in texts for votes in given.values() for vote in votes if vote.score is not None]
    return judgements, People(
        voters=len(heard),
        votes=sum(spoken),
        prompts=len({judgement.prompt_id for judgement in judgements}),
        of_prompts=len({item.prompt.prompt_id for item in comparisons}),
        comparisons=len(judgements),
        of_comparisons=len(asked),
        elsewhere=len(spoken) - sum(spoken),
    )


class _Finder:
    """The votes of one person, skips left out."""

    def __init__(self, given: Sequence[Given]) -> None:
        self._by_texts: dict[_Texts, dict[Compared, Given]] = {}
        for vote in given:
            if vote.score is not None:
                self._by_texts.setdefault(in_order(vote.texts), {})[vote.key] = vote

    def find(self, item: Comparison) -> Given | None:
        votes = self._by_texts.get(texts_of(item))
        if votes is None:
            return None
        return votes.get(item.key) or list(votes.values())[-1]


def _judgement(item: Comparison, votes: Sequence[Given]) -> Judgement:
    straight = [vote.first.strip() == item.response.text for vote in votes]
    scores = [
        vote.score if vote.score is None or model_first else 1.0 - vote.score
        for vote, model_first in zip(votes, straight, strict=True)
    ]
    score = majority(scores)
    order = f"{item.model if 2 * sum(straight) >= len(straight) else item.baseline}_first"
    # half a character, which a note may hold, cannot stand in a table
    notes = [vote.note.encode(errors="replace").decode() for vote in votes if vote.note]
    return Judgement(
        prompt_id=item.prompt.prompt_id,
        sample=item.sample,
        judge=HUMAN,
        model=item.model,
        baseline=item.baseline,
        order=order,
        winner=winner_of(score, item.model, item.baseline),
        score=score,
        words="\n".join(notes) or None,
    )


def texts_of(item: Comparison) -> _Texts:
    """What is compared, whoever wrote which."""
    return in_order((item.prompt.text, item.response.text, item.against.text))


def in_order(texts: tuple[str, str, str]) -> _Texts:
    """A prompt and two responses, whichever stood first."""
    one, other = sorted((texts[1].strip(), texts[2].strip()))
    return texts[0].strip(), one, other
