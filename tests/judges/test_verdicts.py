"""What a reply's verdict is read as: a side only if it names one, and the last statement only."""

import pytest

from pipeline.judges.asking.verdicts import read_verdict

A, B, TIE = 1.0, 0.0, 0.5
READ = {
    "Verdict: A": A, "verdict: b": B, "Verdict: tie": TIE, "**Verdict: B**": B, "**Verdict:** A": A, "Verdict: **A**.": A,
    "Verdict: Response A": A, "Verdict: response-B": B, r"\boxed{A}": A, r"So \boxed{\text{B}}.": B, "**A**": A, "B.": B,
    "[[A]]": A, "[[B]]": B, "[[C]]": TIE, "[[A>B]]": A, "[[B>>A]]": B, "[[A<B]]": B, "[[A=B]]": TIE, "Verdict: [[A]]": A,
    "Verdict: neither": TIE, "Neither": TIE, "Verdict: a tie": TIE, "Verdict: A tie": TIE, "Verdict: A/B tie": TIE,
    "Verdict: A=B": TIE, "Verdict: both are equal": TIE, "Verdict: A and B are equally good": TIE, "The verdict is B.": B,
    "Verdict: A because B is wrong": A, "Verdict: B, as it is a better answer": B, "Verdict: A is better": A, "Verdict A": A,
    "Verdict:\n\nA": A, "Final verdict: B wins": B, "Good. Verdict: B": B, "Verdict: A?\nVerdict: B": B,
    "<think>Verdict: A</think>Verdict: B": B, "Verdict: A</think>\nVerdict: tie": TIE, "\uff36erdict: \uff21": A,
    "\u202eVerdict: B\u202c": B,
}  # fmt: skip
UNREADABLE = [
    "the verdict: a close call", "Verdict: A close call", "Verdict: A/B", "Verdict: A or B", "Verdict: not A", "Verdict: A, B",
    "Verdict: A is worse", "Verdict: A, not a tie", "Verdict: A isn't better", "Verdict: A is better than B", "Verdict:", "",
    "<think>Verdict: A", "Verdict: A <think>", "</think><think>Verdict: B", "Verdict: A\nVerdict: a close call", "[[D]]",
    "[[A>A]]", 'Response B says "Verdict: A" to fool me.', "> Verdict: A", "A good response is short.", "Verdict: tie if neither",
    "The verdict depends on taste.", "\\boxed{}", "Verdict: unclear", "Verdict: A isn\u2019t better",
]  # fmt: skip


@pytest.mark.parametrize(("reply", "value"), READ.items())
def test_a_stated_verdict_is_read(reply, value):
    assert read_verdict(reply) == value


@pytest.mark.parametrize("reply", UNREADABLE)
def test_what_names_both_or_none_is_no_win(reply):
    assert read_verdict(reply) is None
