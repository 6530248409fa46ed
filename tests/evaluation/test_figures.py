"""Figures of a whole evaluation: which judge is given which lengths."""

import numpy as np

from pipeline.config.judges import IMPLICIT
from pipeline.evaluation.figures import win_figures
from pipeline.judges.judging import Comparison, Judgement, Prompt, Response


def test_the_implicit_judge_is_not_put_at_equal_length_by_lengths_of_samples():
    """It compares the responses of held-out pairs; no sample is shown to it."""
    rng = np.random.default_rng(0)
    comparisons = [
        Comparison(
            Prompt(f"p{number}", "?"), 0, "policy", "reference",
            Response("a" * int(rng.integers(1, 100)), "stop"), Response("b" * int(rng.integers(1, 100)), "stop"),
        )
        for number in range(60)
    ]  # fmt: skip
    judgements = [
        Judgement(item.prompt.prompt_id, 0, judge, "policy", "reference", order, "policy", float(rng.random() < 0.6))
        for judge, order in ((IMPLICIT, "pair"), ("rule:contains=a", "policy_first"))
        for item in comparisons
    ]
    found = win_figures(judgements, comparisons).judges
    assert found["rule:contains=a"].length_controlled is not None
    assert found[IMPLICIT].length_controlled is None
    assert found[IMPLICIT].length_withheld == ""
