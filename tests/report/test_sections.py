"""The tables of a report: what stands in their cells, beside which words, and where the rows of their figures are."""

from pipeline.report.sections import sections
from pipeline.report.words import cautions, second_opinions
from tests.report.evaluations import ODDS, figures, rate, typed


def test_what_length_predicts_of_pairs_is_said_beside_reward_accuracy():
    found = figures(0.7, 0.6, 0.8, implicit=rate(0.88, 0.8, 0.95))
    found["baselines"]["implicit"] = {"shorter": {"mean": 1.0, "low": 0.95, "high": 1.0}, "shuffled": ODDS}
    said = second_opinions(typed(found))
    assert said[-1] == (
        "implicit: the guess that the shorter response is the chosen one is right more often: 100% (95 % interval 95% to 100%)."
    )
    table = next(section for section in sections(typed(found), "r") if section.title == "Without any training")
    row = table.rows[1]
    assert [str(cell) for cell in row] == [
        "implicit",
        "0.88, n = 40",
        "1.00 (0.95 to 1.00)",
        "-",
        "-",
        "-",
        "0.50 (0.40 to 0.60)",
    ]
    assert row[2].tone == "above"


def test_judges_that_are_models_are_said_not_to_have_been_asked():
    found = figures(0.7, 0.6, 0.8, **{"llm:x": rate()})
    found["baselines"]["llm:x"] = {"shorter": ODDS, "longer": ODDS}
    table = next(section for section in sections(typed(found), "r") if section.title == "Without any training")
    assert [str(cell) for cell in table.rows[1][4:6]] == ["not asked", "not asked"]


def test_another_outcome_where_both_ended_is_said():
    found = figures(0.8, 0.7, 0.9)
    assert not any("ended by themselves" in line for line in cautions(typed(found)))
    even = {"prompts": 27, "comparisons": 27, "rate": {"mean": 0.41, "low": 0.24, "high": 0.6}}
    found["endings"]["rule:no_repetition"]["both ended"] = even
    assert any(
        line.startswith(
            "Where both responses ended by themselves, rule:no_repetition prefers the policy on 41% of 27 prompts"
        )
        and line.endswith("where one was cut off, on 70% of 20 (95 % interval 60% to 80%).")
        for line in cautions(typed(found))
    )
    # one kind alone: nothing to tell apart
    del found["endings"]["rule:no_repetition"]["some cut off"]
    assert not any("ended by themselves" in line for line in cautions(typed(found)))
    assert "Win rates by how responses ended" not in [section.title for section in sections(typed(found), "r")]


def test_estimates_and_positions_of_kl_are_tables():
    found = {section.title: section for section in sections(typed(figures()), "r")}
    assert found["KL by three estimates"].rows == [["policy", "sampled", "30.000", "25.000 to 35.000", "2.500", "1.00"]]
    assert found["KL by position"].rows == [
        ["policy", "1 to 8", "320", "24.000", "80%", "20.000", "100%"],
        ["policy", "end token", "36", "6.000", "20%", "-", "-"],
    ]
