"""The index of comparisons: what it says of every row is what the figures of an evaluation rest on."""

import random
from collections import Counter
from itertools import combinations

import numpy as np
import pyarrow as pa
import pytest

from pipeline.artifacts.runs import RUNS, Run
from pipeline.artifacts.schemas import JUDGEMENTS, SAMPLES
from pipeline.artifacts.tables import read_table, write_table
from pipeline.errors import DataError
from pipeline.evaluation.rates.winrates import both_orders, win_rate
from pipeline.judges.judging import Judgement
from pipeline.view.comparisons import compared_models, comparisons
from tests.view.runs import JUDGES, TOPICS, make_run, prompt_id, said_of, write_judgements, write_kl, write_samples

MODELS = ("policy", "round1", "reference")
PAIRS = list(combinations(MODELS, 2))


def letter_of(found):
    """As the pages' legend has it, of `both_orders`' outcome."""
    if found is None:
        return "-"
    letter = "X" if found.score is None else "W" if found.score > 0.5 else "L" if found.score < 0.5 else "T"
    return letter.lower() if found.flipped else letter


def random_run(seed, prompts=40, samples=2, judges=("verdicts", "chances")):
    """Three models; every judge says at random nothing, one order or both, fails, or gives a verdict or a probability."""
    draw = random.Random(seed)
    run = Run(RUNS / f"random{seed}")
    run.directory.mkdir(parents=True)
    keys = [(prompt, sample) for prompt in range(prompts) for sample in range(samples)]
    rows = [
        {"prompt_id": prompt_id(prompt), "sample": sample, "model": model, "topic": "t", "prompt": f"p{prompt}",
         "response": f"{model} {sample}", "response_ids": [1], "finish_reason": "stop", "tokens": 1}
        for model in MODELS
        for prompt, sample in keys
        if model != "round1" or prompt % 3
    ]  # fmt: skip
    draw.shuffle(rows)
    write_table(run.samples, pa.Table.from_pylist(rows, schema=SAMPLES))
    said = []
    for judge in judges:
        scores = [0.0, 0.5, 1.0] if judge == "verdicts" else [0.0, 0.001, 0.2, 0.5, 0.8, 1.0, 0.37]
        for model, baseline in PAIRS:
            for prompt, sample in keys:
                for order in (model, baseline):
                    if draw.random() < 0.2:
                        continue
                    score = None if draw.random() < 0.1 else draw.choice(scores)
                    about = (prompt_id(prompt), sample, judge, model, baseline, f"{order}_first", "x", score, None)
                    said.append(Judgement(*about))
    said.append(Judgement(prompt_id(0), 0, "implicit", "policy", "reference", "pair", "policy", 1.0))
    draw.shuffle(said)
    write_table(run.judgements, pa.Table.from_pylist([vars(one) for one in said], schema=JUDGEMENTS))
    return run, said


@pytest.mark.parametrize("seed", range(4))
def test_letters_and_scores_are_those_of_the_figures(seed):
    run, said = random_run(seed)
    seen = Counter()
    assert sorted(compared_models(run)) == sorted(PAIRS)
    for number, (model, baseline) in enumerate(compared_models(run)):
        index = comparisons(run, number)
        assert (index.model, index.baseline) == (model, baseline)
        assert set(index.judges) == {"verdicts", "chances"}  # the implicit judge reads pairs, not samples
        for judge, (letters, scores) in index.judges.items():
            expected = both_orders(
                one for one in said if (one.judge, one.model, one.baseline) == (judge, model, baseline)
            )
            for row, key in enumerate(index.table.select("prompt_id", "sample").rows()):
                found = expected.get(key)
                assert letters[row] == letter_of(found), (judge, key)
                if found is None or found.score is None:
                    assert np.isnan(scores[row])
                else:
                    assert scores[row] == pytest.approx(found.score, abs=1e-12)
            seen.update(letters)
    assert set(seen) == set(
        "WTLX-wtl"
    )  # of every kind there was one; of two orders a failed one leaves no contradiction


def test_counts_are_those_of_the_win_rate():
    run = make_run(samples=1, prompts=60)
    index = comparisons(run, 0)
    assert set(index.judges) == set(JUDGES)
    for judge, said in said_of(run).items():
        letters, _ = index.judges[judge]
        rate = win_rate(said)
        upper = Counter(letters.upper())
        assert (upper["W"], upper["T"], upper["L"], upper["X"]) == (rate.wins, rate.ties, rate.losses, rate.failed)
        assert sum(letter.islower() for letter in letters) == rate.flips > 0
        assert len(letters) - upper["-"] == rate.comparisons


def test_a_row_says_of_its_comparison_what_the_tables_say():
    run = make_run()
    shown = comparisons(run, 0).described()
    count = 24 * 2
    assert [(shown["prompts"]["prompt_id"][prompt], sample) for prompt, sample in zip(shown["prompt"], shown["sample"], strict=True)] == [
        (prompt_id(number // 2), number % 2) for number in range(count)
    ]  # fmt: skip
    assert shown["cut"] == [(number % 5 == 0) + 2 * (number % 7 == 0) for number in range(count)]
    assert shown["tokens"] == [5 + number * 3 % 37 for number in range(count)]
    assert shown["baseline_tokens"] == [5 + number * 4 % 37 for number in range(count)]
    assert [shown["topics"][topic] for topic in shown["prompts"]["topic"]] == [TOPICS[at % 3] for at in range(24)]
    assert shown["prompts"]["start"] == [f"Subject {at}?" for at in range(24)]
    # of the policy's own samples, summed over three tokens; of every fifth prompt there is none
    expected = [None if at % 5 == 4 else pytest.approx(0.03 * at, abs=1e-4) for at in range(24)]
    assert shown["prompts"]["kl"] == expected
    assert [judge["name"] for judge in shown["judges"]] == list(JUDGES)
    assert {len(judge["letters"]) for judge in shown["judges"]} == {count}
    assert all((score is None) == (letter in "X-") for judge in shown["judges"] for letter, score in zip(judge["letters"], judge["scores"], strict=True))  # fmt: skip


def test_rows_stand_in_the_order_of_the_file_and_know_their_places_in_it():
    run, _ = random_run(7)
    table = read_table(run.samples, SAMPLES).to_pylist()
    for number, (model, baseline) in enumerate(compared_models(run)):
        rows = comparisons(run, number).table
        assert rows["row"].is_sorted()
        assert len(rows) == (80 if "round1" not in (model, baseline) else 52)
        for key, row, other in zip(
            rows.select("prompt_id", "sample").rows(), rows["row"], rows["row_baseline"], strict=True
        ):
            for place, side in ((row, model), (other, baseline)):
                assert (table[place]["prompt_id"], table[place]["sample"], table[place]["model"]) == (*key, side)


def test_models_are_compared_before_anything_is_judged():
    run = make_run(judges=())
    assert compared_models(run) == [("policy", "reference")]
    index = comparisons(run, 0)
    assert len(index.table) == 48
    assert not index.judges


def test_there_is_no_number_beyond_the_models():
    run = make_run()
    for number in (1, -1):
        with pytest.raises(DataError, match="compares 1 pairs of models"):
            comparisons(run, number)


def test_a_file_that_a_stage_replaced_is_read_anew():
    run = make_run()
    letters = comparisons(run, 0).judges["rule:words"][0]
    assert comparisons(run, 0).judges["rule:words"][0] == letters == "WTLX-t" * 8
    write_judgements(run, 24, 2, outcomes="L")
    assert comparisons(run, 0).judges["rule:words"][0] == "L" * 48
    write_samples(run, 30, 2)
    assert len(comparisons(run, 0).table) == 60
    assert comparisons(run, 0).judges["rule:words"][0] == "L" * 48 + "-" * 12
    write_kl(run, 1)
    assert comparisons(run, 0).prompts["kl"].count() == 1
