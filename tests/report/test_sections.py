"""The tables of a report: what stands in their cells, beside which words, and where the rows of their figures are."""

from pipeline.report.addresses import judged, pairs, responses
from pipeline.report.sections import sections
from pipeline.report.words import cautions, second_opinions
from tests.report.evaluations import ODDS, crowded, figures, rate, typed


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


def by_title(found):
    return {section.title: section for section in sections(typed(found), "r")}


def test_every_table_names_the_file_of_its_rows():
    for section in by_title(crowded()).values():
        assert ".parquet" in section.source or "verdicts/" in section.source, section.title
        assert "judge" in section.source or "model" in section.source, section.title


def test_every_rate_has_its_n_in_its_row():
    for title, section in by_title(crowded()).items():
        counted = "prompts" in section.head or title == "Responses"
        for row in section.rows:
            for head, cell in zip(section.head, map(str, row), strict=True):
                is_rate = head in {"win rate", "cut off", "empty", "policy", "shorter wins"} or title == "By topic"
                if is_rate and any(sign.isdigit() for sign in cell):
                    assert counted or ", n = " in cell, (title, head, cell)


def test_figures_lead_to_their_rows():
    judge = "rule:no_repetition"
    found = by_title(figures() | {"judges": {judge: rate(failed=2, ties=0), "implicit": rate()}})
    policy, implicit = found["Policy against reference"].rows
    assert policy[0].rows == judged("r", judge)
    won, tied, lost = policy[4].rows
    assert (won, tied, lost) == (judged("r", judge, outcome="won"), "", judged("r", judge, outcome="lost"))
    assert str(policy[4]) == "20 / 0 / 4"
    assert (policy[6].rows, policy[7].rows) == ("", judged("r", judge, outcome="failed"))
    assert implicit[0].rows == pairs("r")
    assert list(implicit[4].rows) == ["", "", ""]
    assert found["By topic"].rows[0][1].rows == judged("r", judge, topic="a<b>")
    assert found["Other models"].rows[0][0].rows == judged("r", judge, "round1", "reference")
    ratings = found[f"Bradley-Terry ratings by {judge}"]
    assert [row[0].rows for row in ratings.rows] == [judged("r", judge), judged("r", judge, "round1"), ""]
    assert [row[0].rows for row in found["Responses"].rows] == [responses("r", "policy"), responses("r", "reference")]
