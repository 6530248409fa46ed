"""Agreement of judges against hand values, scikit-learn and simulated voices; what judges lean to; files read back."""

import json
import re

import numpy as np
import pyarrow as pa
import pytest

from pipeline.artifacts.schemas import PAIRS, SAMPLES
from pipeline.artifacts.tables import write_table
from pipeline.errors import DataError
from pipeline.evaluation.figures import judgements_table
from pipeline.evaluation.rates.agreement import agreement, kappas, voice, votes_of
from pipeline.evaluation.results import Results, write_results
from pipeline.exchange.judged_samples import write_alpaca_eval, write_arena_hard
from pipeline.judges.annotations import Vote, read_votes
from pipeline.judges.judging import Comparison, Judge, Prompt, Response, judge_both_orders, judge_implicitly
from pipeline.pairs.splits import prompt_id_of
from tests.conftest import refscore_here, write_rows


def votes(scores):
    """One vote per prompt on "aa" (first) and "b"."""
    return [Vote(f"p{n}", "aa", "b", score) for n, score in enumerate(scores)]


def test_hand_values():
    # 10 prompts: both first 4, both second 3, one tie against first, two opposite
    found = agreement(
        voice("x", votes([1, 1, 1, 1, 0, 0, 0, 0.5, 1, 1])), voice("y", votes([1, 1, 1, 1, 0, 0, 0, 1, 0, 0]))
    )
    assert (found.comparisons, found.prompts) == (10, 10)
    assert found.same.mean == pytest.approx(0.7)
    assert found.decided.mean == pytest.approx(7 / 9)
    chance = 0.6 * 0.5 + 0.3 * 0.5
    assert found.kappa.mean == pytest.approx((0.7 - chance) / (1 - chance))
    # of the decided: x says the longer 6 of 9, y 5 of 10
    assert [one.mean for one in found.longer] == [pytest.approx(6 / 9), 0.5]


def test_kappa_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    one = rng.choice([0.0, 0.5, 1.0], 200)
    other = np.where(rng.random(200) < 0.5, one, rng.choice([0.0, 0.5, 1.0], 200))
    found = agreement(voice("x", votes(one)), voice("y", votes(other)))
    assert found.kappa.mean == pytest.approx(metrics.cohen_kappa_score(2 * one, 2 * other))
    assert found.kappa.low < found.kappa.mean < found.kappa.high


@pytest.mark.parametrize("number", [20, 120])
def test_intervals_of_kappa_hold_the_true_one(number):
    rng = np.random.default_rng(number)
    # voices that agree on purpose in half of the prompts: kappa 0.5
    held = 0
    for _ in range(60):
        one = rng.integers(0, 2, number).astype(float)
        other = np.where(rng.random(number) < 0.5, one, rng.integers(0, 2, number))
        kappa = agreement(voice("x", votes(one)), voice("y", votes(other.tolist()))).kappa
        held += kappa.low <= 0.5 <= kappa.high
    assert held >= 53


def test_where_both_always_say_the_same_there_is_no_kappa_and_agreement_is_no_certainty():
    found = agreement(voice("x", votes([1] * 20)), voice("y", votes([1] * 20)))
    assert found.kappa is None
    assert found.same.low < 0.9
    assert np.isnan(kappas(np.diag([1.0, 0, 0])))
    assert agreement(voice("x", votes([1])), voice("y", [Vote("q", "a", "b", 1.0)])) is None


def test_the_order_of_a_file_does_not_matter_and_people_are_a_majority():
    mine = voice("x", votes([1, 0, 1]))
    turned = voice("y", [Vote(vote.prompt, vote.second, vote.first, 1 - vote.score) for vote in votes([1, 0, 1])])
    assert agreement(mine, turned).same.mean == 1
    people = voice("people", [*votes([1, 0, 1]), *votes([1, 0, 0]), *votes([0, 0, None])])
    assert [people.scores[f"p{n}", "aa", "b"] for n in range(3)] == [1.0, 0.0, 0.5]


def test_leanings():
    both = [Vote(f"p{n}", "aa", "b", 1.0) for n in range(4)] + [Vote(f"p{n}", "b", "aa", n / 3) for n in (0, 3)]
    found = voice("x", both).leanings
    # two were asked in both orders: one agrees with itself, one prefers whoever comes first
    assert found.contradictions == 0.5
    assert found.first_wins == pytest.approx(3 / 4)
    assert found.longer.mean == 1.0
    one_order = voice("x", votes([1, 0, 0.5])).leanings
    assert (one_order.first_wins, one_order.contradictions) == (None, None)
    assert one_order.longer.mean == 0.5
    # responses of equal length say nothing about length
    assert voice("x", [*votes([1]), Vote("z", "c", "b", 0.0)]).leanings.longer.mean == 1.0
    assert voice("x", [Vote("z", "c", "b", 0.0)]).leanings.longer is None
    assert voice(
        "x", [Vote("p", "a", "b", 1.0, 0.002), Vote("q", "a", "b", 1.0, 0.004)]
    ).leanings.price == pytest.approx(3)


ODD = [
    "a\u2028b",
    "a\u2029b",
    "a\x85b",
    "a\r\nb",
    "a\x0b\x0c\x1cb",
    "\u202eab",
    '"quoted"\\',
    "emoji \U0001f642",
    "\x00",
    "a\tb",
]


@pytest.mark.parametrize("write", [write_alpaca_eval, write_arena_hard])
def test_an_export_is_read_back_whatever_lines_end_with(tmp_path, write):
    items = [
        Comparison(
            Prompt(f"p{n}", f"prompt {n} {odd}"), 0, "policy", "reference", Response(odd + "x" * n, "stop"), Response(f"{n}{odd}", "stop")
        )
        for n, odd in enumerate(ODD)
    ]  # fmt: skip
    longer = Judge("longer", lambda duels: [float(len(duel.first.text) > len(duel.second.text)) for duel in duels])
    judged = judge_both_orders(longer, items)
    files = write(tmp_path, items, judged)
    (path,) = [file for file in files if "annotations" in file.name or "model_judgment" in file.parts]
    theirs = voice("file", read_votes(path))
    ours = voice("longer", votes_of(judged, items)["longer"])
    assert theirs.scores == ours.scores
    assert len(ours.scores) == len(ODD)


@pytest.mark.parametrize(
    ("file", "row", "problem"),
    [
        ("question.jsonl", {"question_id": 1, "prompt": "p"}, "row 1: not an Arena-Hard question (KeyError('uid'))"),
        ("question.jsonl", {"uid": "1"}, "row 1: not an Arena-Hard question (KeyError('prompt'))"),
        ("question.jsonl", {"uid": ["1"], "prompt": "p"}, "row 1: not an Arena-Hard question (TypeError"),
        ("question.jsonl", {"uid": "1", "prompt": None}, "row 1: not an Arena-Hard question (TypeError"),
        ("model_answer/m.jsonl", {"uid": "1", "model": "m"}, "row 1: not an Arena-Hard answer (KeyError('messages'))"),
        (
            "model_answer/m.jsonl",
            {"uid": "1", "model": "m", "messages": []},
            "row 1: not an Arena-Hard answer (IndexError",
        ),
        (
            "model_answer/m.jsonl",
            {"uid": "1", "model": "m", "messages": 3},
            "row 1: not an Arena-Hard answer (TypeError",
        ),
        (
            "model_answer/m.jsonl",
            {"uid": "1", "messages": [{"content": "a"}]},
            "row 1: not an Arena-Hard answer (KeyError('model'))",
        ),
        (
            "model_answer/m.jsonl",
            {"uid": "1", "model": "m", "messages": [{"content": {"answer": 3}}]},
            "expected text, got int",
        ),
        ("model_judgment/judge/m.jsonl", {"uid": "0", "games": 3}, "row 1: not an Arena-Hard judgment"),
        (
            "model_judgment/judge/m.jsonl",
            {"uid": "0", "model": "m", "baseline": "b", "games": ["A>B", "B>A"]},
            "row 1: not an Arena-Hard judgment",
        ),
        (
            "model_judgment/judge/m.jsonl",
            {"uid": ["0"], "games": [], "model": "m", "baseline": "b"},
            "row 1: not an Arena-Hard judgment",
        ),
    ],
)
def test_a_file_of_another_form_beside_arena_hard_judgments_is_named_with_its_row(tmp_path, file, row, problem):
    files = {
        "question.jsonl": [{"uid": "0", "prompt": "p"}],
        "model_answer/b.jsonl": [{"uid": "0", "model": "b", "messages": [{"content": {"answer": "x"}}]}],
        "model_answer/m.jsonl": [{"uid": "0", "model": "m", "messages": [{"content": "y"}]}],
        "model_judgment/judge/m.jsonl": [
            {"uid": "0", "model": "m", "baseline": "b", "games": [{"score": "A>B"}, {"score": "B>A"}]}
        ],
    }
    judgments = tmp_path / "model_judgment/judge/m.jsonl"
    for name, rows in files.items():
        write_rows(tmp_path / name, rows)
    assert read_votes(judgments) == [Vote("p", "x", "y", 1.0), Vote("p", "y", "x", 0.0)]
    write_rows(tmp_path / file, [*files[file], row])
    with pytest.raises(DataError, match=re.escape(problem)) as raised:
        read_votes(judgments)
    assert str(raised.value).startswith(str(tmp_path / file))


def test_a_file_nested_too_deeply_cannot_be_read(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 99_999)
    with pytest.raises(DataError, match="cannot be read"):
        read_votes(tmp_path / "deep.json")


def test_the_command_compares_files_and_says_why_it_cannot(tmp_path):
    def file(name, scores, prompt="p"):
        rows = [
            {"instruction": f"{prompt}{n}", "output_1": "long one", "output_2": "b", "preference": None if score is None else 2 - score}
            for n, score in enumerate(scores)
        ]  # fmt: skip
        (tmp_path / name).write_text(json.dumps(rows))

    file("ours.json", [1, 1, 0, 0, None])
    file("people.json", [1, 0, 0, 0, 1])
    said = refscore_here(tmp_path, "judges", "--annotations", "ours.json", "--against", "people.json")
    assert "Against people.json" in said
    # 3 of 4, chance 1/2
    assert "0.75 (0.30 to 0.95)" in said
    assert "0.50 (-0.40 to 0.91)" in said
    assert "0.25 (0.05 to 0.70)" in said
    file("others.json", [1], prompt="q")
    assert "no prompt is in both" in refscore_here(
        tmp_path, "judges", "--annotations", "ours.json", "--against", "others.json", code=3
    )
    assert "--run NAME, or --annotations FILE" in refscore_here(tmp_path, "judges", code=2)
    assert "cannot be read" in refscore_here(tmp_path, "judges", "--annotations", "absent.json", code=3)
    assert "is no file" in refscore_here(tmp_path, "judges", "--annotations", "/dev/null", code=3)


def row_of(schema, **fields):
    """A row of `schema` in which what is not given is empty."""
    empty = {"string": "", "int32": 0, "int64": 0, "double": 0.0}
    return {field.name: fields.get(field.name, empty.get(str(field.type), [])) for field in schema}


def test_the_judges_of_a_run_are_set_against_each_other_with_their_price(tmp_path):
    run = tmp_path / "data/runs/r"
    run.mkdir(parents=True)
    texts = {"policy": "a long one", "reference": "b"}
    pairs = [row_of(PAIRS, split="eval", prompt=f"prompt {n}", prompt_ids=[n]) for n in range(4)]
    ids = [prompt_id_of([n]) for n in range(4)]
    samples = [
        row_of(SAMPLES, prompt_id=one, model=model, prompt="", response=text, finish_reason="stop")
        for model, text in texts.items()
        for one in ids
    ]
    items = [
        Comparison(Prompt(one, ""), 0, "policy", "reference", *(Response(text, "stop") for text in texts.values()))
        for one in ids
    ]
    opinions = {"longer": lambda duel: float(len(duel.first.text) > len(duel.second.text)), "position": lambda _: 1.0}
    judgements = [
        judgement
        for name, says in opinions.items()
        for judgement in judge_both_orders(Judge(name, lambda duels, says=says: [says(one) for one in duels]), items)
    ]
    judgements += judge_implicitly("implicit", ids, [0.1] * 4)
    write_table(run / "pairs.parquet", pa.Table.from_pylist(pairs, schema=PAIRS))
    write_table(run / "samples.parquet", pa.Table.from_pylist(samples, schema=SAMPLES))
    write_table(run / "judgements.parquet", judgements_table(judgements))
    write_results(run / "eval.json", Results(judge_costs={"position": {"price": 0.5}}))
    said = refscore_here(tmp_path, "judges", "--run", "r")
    rows = [line.split() for line in said.splitlines()]
    # comparisons, first wins, contradictions, longer, price of 1,000: 4 comparisons for 0.5
    assert ["longer", "4", "0.50", "0.00", "1.00", "(0.51", "to", "1.00)", "-"] in rows
    assert ["position", "4", "1.00", "1.00", "-", "125.00"] in rows
    # one always names a winner, the other contradicts itself: never the same, and nothing beyond chance
    assert ["1", "longer", "0.00", "(0.00", "to", "0.49)"] in rows
    assert "implicit" not in said
