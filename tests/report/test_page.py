"""The report is self-contained, says what the figures say, and nothing a model writes can act in it."""

import json
from dataclasses import replace

import pyarrow as pa
import pytest
from pydantic import TypeAdapter

from pipeline.artifacts.markdown import plain
from pipeline.artifacts.runs import Run, record
from pipeline.artifacts.tables import METRICS, write_table
from pipeline.config.experiment import Config
from pipeline.evaluation.baselines import GainByLength
from pipeline.evaluation.results import Results, SideBySide
from pipeline.report.markdown import write_markdown
from pipeline.report.page import write_report
from pipeline.report.sections import sections
from pipeline.report.side_by_side import marked, visible
from pipeline.report.words import cautions, second_opinions, verdict

HOSTILE = [
    "<script>document.title='pwned'</script>",
    "<img src=x onerror=\"document.title='pwned'\">",
    '"><svg onload="document.title=\'pwned\'">',
    "</div></details></style><iframe src=//evil.example></iframe>",
    "{{ 7 * 7 }} {% raise %}",
    "&lt;script&gt; \u202e reversed \x00 null \ud800 lone",
    "<!-- --><style>*{display:none}</style>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'><base href=//evil.example>",
    "<a href=\"javascript:document.title='pwned'\">$x^2$ \\(a\\)</a>",
    "a" * 5000,
]


GAINS = {"rule:no_repetition": GainByLength(rewards=True, points=[(-3.0, 0.25), (4.0, -0.5)])}
ODDS = {"mean": 0.5, "low": 0.4, "high": 0.6}
SPLIT = {"prompts": 20, "comparisons": 25, "rate": {"mean": 0.7, "low": 0.6, "high": 0.8}}


def rate(mean=0.7, low=0.6, high=0.8, **other):
    found = {
        "prompts": 40,
        "rate": {"mean": mean, "low": low, "high": high},
        "method": "wilson",
        "wins": 20,
        "ties": 16,
    }
    found |= {"losses": 4, "failed": 0, "worst": mean, "best": mean, "comparisons": 40, "flips": 0, "first_wins": 0.5}
    found |= {"sign_test_p": 0.01, "detectable": 0.12, "length_controlled": {"mean": mean, "low": low, "high": high}}
    return found | {"prompts_needed": 230} | other


def figures(*interval, **judges):
    tokens = {"mean": 30.0, "low": 25.0, "high": 35.0}
    seen = {"responses": 40, "tokens": tokens, "words": 20.0, "cut_off": 0.1, "repetition": 0.0, "empty": 0.0}
    estimates = {"sampled": {"interval": tokens, "standard_error": 2.5, "variance_ratio": 1.0}}
    positions = [
        {"where": "1 to 8", "tokens": 320, "sampled": 24.0, "exact": 20.0},
        {"where": "end token", "tokens": 36, "sampled": 6.0},
    ]
    cost = {
        "kl": tokens,
        "estimates": estimates,
        "positions": positions,
        "per_token": 0.3,
        "perplexity": 12.5,
        "responses": 40,
        "tokens": 900,
    }
    reward = {"reward": {"rule:no_repetition": {"mean": 0.9, "low": 0.8, "high": 1.0}}}
    one = rate(*interval)
    return {
        "models": {"policy": "a/<b>", "reference": "c"},
        "pair_judge": "rule:no_repetition",
        "judges": {"rule:no_repetition": one, **judges},
        "others": [{"model": "round1", "baseline": "reference", "judge": "rule:no_repetition", "rate": one}],
        "ratings": {"rule:no_repetition": {"policy": tokens, "round1": tokens, "reference": tokens}},
        "topics": {"rule:no_repetition": {"a<b>": one["rate"], "b": one["rate"]}},
        "responses": {"policy": seen, "reference": seen},
        "cost": {"policy": cost | reward, "reference": reward},
        "baselines": {
            name: {"shorter": ODDS, "longer": ODDS, "first_sentence": ODDS} for name in ("rule:no_repetition", *judges)
        },
        "endings": {"rule:no_repetition": dict.fromkeys(("both ended", "some cut off"), SPLIT)},
        "judge_costs": {"rule:no_repetition": {"requests": 3, "price": 0.5}},
        "held_out": None,
    }


def typed(content):
    return TypeAdapter(Results).validate_python(content)


def write(run, samples=HOSTILE):
    config = Config.model_validate({"data": {"path": "</pre><script>document.title='pwned'</script>"}})
    record(run, config, "precompute", reference_id="ab" * 32, digests={"data": {"<b>x</b>": "cd"}})
    rows = {name: [0, 1] if name == "step" else [0.7, 0.6] for name in METRICS.names}
    write_table(run.metrics, pa.table(rows, schema=METRICS))
    run.health.write_text('{"words": ["All is <i>well</i>."]}')
    sides = [
        SideBySide(
            prompt_id="p",
            sample=0,
            topic=text,
            prompt=text,
            policy=text,
            reference=f"x {text} y",
            difference=-0.5,
            marks=0.1,
            policy_finish="length",
            reference_finish="stop",
        )
        for text in samples
    ]
    results = typed(figures())
    results = replace(results, verdict=verdict(results))
    write_report(run, config, results, sides, GAINS)
    write_markdown(run, config, results)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write(Run(tmp_path_factory.mktemp("report") / "run"))


def test_hostile_text_is_escaped_everywhere(run):
    page = run.report.read_text()
    for needle in ("<script", "<img", "<iframe", "<b>x", "<i>well", "a<b>", "a/<b>", "<base", "<a href"):
        assert needle not in page
    assert page.count("&lt;script&gt;document.title=") >= 4
    assert "{{ 7 * 7 }}" in page
    assert "default-src 'none'" in page
    for hidden in ("\u202e", "\x00", "\ud800"):
        assert hidden not in page
    assert "[U+202E]" in page


def test_the_page_says_how_exact_the_scores_are(run, tmp_path):
    assert "Stored scores against transformers" not in run.report.read_text()
    other = Run(tmp_path / "run")
    other.directory.mkdir()
    found = {"passed": False, "pairs": 20, "verdict": "the scores <i>differ", "mean_signed_difference": -0.0123}
    found |= {"correlation_with_length": -0.61, "margin_noise_nats": 0.39, "margin_noise_reward": 0.039}
    (other.directory / "verify.json").write_text(json.dumps(found))
    page = write(other).report.read_text()
    for part in (
        "20 pairs (not passed): the scores &lt;i&gt;differ.",
        "-0.012 nats per token",
        "-0.61",
        "0.39 nats, 0.039 in reward",
    ):
        assert part in page


def test_nothing_is_loaded_from_elsewhere(run):
    page = run.report.read_text()
    for attribute in ("src=", "<link", "@import", "url(http"):
        assert attribute not in page.replace("src=x", "").replace("src=//evil", "")


def test_the_page_shows_what_there_is(run):
    page = run.report.read_text()
    for part in (
        "round1",
        "Bradley-Terry ratings by",
        "By topic",
        "KL to the reference",
        "nats per response",
        "All is &lt;i&gt;well",
        "cut off",
        "Without any training",
        "Win rates by how responses ended",
        "Log-probabilities of the responses",
    ):
        assert part in page
    assert page.count("<svg") == 7


def test_words_of_one_side_alone_are_marked():
    policy, reference = marked("Boil the rice for ten minutes.", "Boil the rice for <b> hours.")
    assert "<mark>ten minutes</mark>." in policy
    assert "Boil the rice for " in reference
    assert "<b>" not in reference
    # nothing in common: marking everything would say nothing
    assert "<mark>" not in marked("one two three", "9 8 7 6 5 4 ; : , .")[0]
    assert visible("a\u200bb") == "a[U+200B]b"


def test_markdown_is_the_same_in_tables_and_shows_marks_as_they_are(run):
    text = run.report_markdown.read_text()
    assert text.splitlines()[2].startswith("**The policy is better than the reference: rule:no\\_repetition")
    assert "| rule:no\\_repetition | 40 | 0.700 | 0.600 to 0.800 |" in text
    assert plain("a|b\n<img> [x](y)") == "a\\|b \\<img\\> \\[x\\](y)"


@pytest.mark.parametrize(
    ("interval", "words"),
    [((0.7, 0.6, 0.8), "is better"), ((0.5, 0.4, 0.6), "No difference"), ((0.2, 0.1, 0.3), "is worse")],
)
def test_the_verdict_follows_the_interval(interval, words):
    assert words in verdict(typed(figures(*interval)))
    assert f"{interval[0]:.0%}" in verdict(typed(figures(*interval)))


def test_judges_that_made_the_pairs_are_named_and_others_agree_or_do_not():
    results = figures(0.7, 0.6, 0.8, better=rate(), even=rate(0.5, 0.4, 0.6), worse=rate(0.2, 0.1, 0.3))
    before = second_opinions(typed(results))
    assert [line.split(":")[0] for line in before[1:]] == [
        "better agrees", "even shows no difference", "worse disagrees",
    ]  # fmt: skip
    related = second_opinions(typed(results | {"shared": {"better": ["length", "repeated words"]}}))
    assert "better, which uses length and repeated words as the judge that made the pairs does, agrees" in related[1]
    found = second_opinions(typed(results | {"shared": {"better": [], "even": [], "worse": []}}))
    assert "no independent judge" in found[0]
    assert [line.split(":")[0] for line in found[1:]] == [
        "better, which uses nothing that the judge that made the pairs does, agrees",
        "even, which uses nothing that the judge that made the pairs does, shows no difference",
        "worse, which uses nothing that the judge that made the pairs does, disagrees",
    ]


def test_a_leading_judge_that_made_no_pair_says_so_and_the_maker_is_named_behind_it():
    results = figures(0.7, 0.6, 0.8, maker=rate()) | {"pair_judge": "maker", "shared": {"rule:no_repetition": []}}
    of_the_leading, of_the_maker = second_opinions(typed(results))
    assert of_the_leading == "rule:no_repetition uses nothing that the judge that made the pairs does."
    assert of_the_maker.startswith("maker, which chose the training pairs, agrees: 70%")
    results["shared"] = {"rule:no_repetition": ["length"]}
    assert second_opinions(typed(results))[0] == (
        "rule:no_repetition uses length as the judge that made the pairs does."
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "40 prompts show a difference of 12 points four times in five; 230 would show 5 points"),
        ({"failed": 4, "worst": 0.6, "best": 0.75}, "failed on 4 of 40 comparisons; had all of them been lost or won"),
        ({"flips": 20}, "contradicted itself on 20 of 40"),
        ({"first_wins": 0.8}, "prefers the response that stands first in 80%"),
        ({"length_controlled": {"mean": 0.5, "low": 0.4, "high": 0.6}}, "length explains part of the outcome"),
        (
            {"length_controlled": None, "length_withheld": "so it is"},
            "No rate at equal length is given for j, because so it is.",
        ),
    ],
)
def test_what_could_mislead_is_said(changes, words):
    found = figures()
    found["judges"] = {"j": rate(**changes)}
    assert any(words in line for line in cautions(typed(found)))


def test_lengths_that_differ_are_said_with_what_can_be_done_about_them():
    found = figures()
    found["responses"] = {
        "policy": found["responses"]["policy"] | {"words": 2.0},
        "reference": found["responses"]["policy"],
    }
    assert any("0.10 times as long" in line and "take that out" in line for line in cautions(typed(found)))
    found["judges"]["rule:no_repetition"]["length_controlled"] = None
    assert any("hardly overlap" in line for line in cautions(typed(found)))


def test_health_is_said_in_words_lengths_included(tmp_path):
    run = write(Run(tmp_path / "run"))
    assert "All is &lt;i&gt;well" in run.report.read_text()
    assert "times as long" not in run.report.read_text()
    run.health.write_text('{"words": []}')
    found = figures()
    write_report(run, Config.model_validate({"data": {"path": "x"}}), typed(found), [], {})
    assert "look wrong" in run.report.read_text()
    found["responses"]["policy"] = {**found["responses"]["policy"], "tokens": {"mean": 999.0, "low": 1.0, "high": 2.0}}
    write_report(run, Config.model_validate({"data": {"path": "x"}}), typed(found), [], {})
    assert "times as long as the reference" in run.report.read_text()


def test_cut_off_responses_of_every_model_are_warned_of():
    found = figures(0.7, 0.6, 0.8)
    shares = {"policy": 0.05, "reference": 0.4, "sft": 0.2}
    seen = {name: found["responses"]["policy"] | {"cut_off": share} for name, share in shares.items()}
    said = cautions(typed(found | {"responses": seen}))
    assert any(line.startswith("40% of the responses of reference were cut off") for line in said)
    assert any(line.startswith("20% of the responses of sft were cut off") for line in said)
    assert not any("of policy were cut off" in line for line in said)
    seen = {name: found["responses"]["policy"] | {"cut_off": 1.0} for name in shares}
    said = cautions(typed(found | {"responses": seen}))
    assert [line for line in said if "longest allowed length" in line] == [
        "No response was ended by its model: all were written to the longest allowed length, so there is no win rate of those that ended."
    ]


def test_a_headline_that_a_trivial_baseline_beats_says_so():
    found = figures(0.8, 0.7, 0.9)
    assert verdict(typed(found)).count(".") == 1
    better = {
        "shorter": {"mean": 0.82, "low": 0.7, "high": 0.9},
        "first_sentence": {"mean": 0.84, "low": 0.75, "high": 0.91},
    }
    found["baselines"]["rule:no_repetition"] |= better
    assert verdict(typed(found)).endswith(
        " The reference cut to its first sentence does better by the same judge: 84% (95 % interval 75% to 91%)."
    )
    # nobody claims anything where the policy is not better, unless the baseline is
    found["judges"]["rule:no_repetition"] = rate(0.5, 0.4, 0.6)
    found["baselines"]["rule:no_repetition"] = {"shorter": {"mean": 0.52, "low": 0.4, "high": 0.6}}
    assert "The shorter" not in verdict(typed(found))
    found["baselines"]["rule:no_repetition"] = {"shorter": {"mean": 0.62, "low": 0.51, "high": 0.7}}
    assert "The shorter of the two responses, whoever wrote it, does better by the same judge: 62%" in verdict(
        typed(found)
    )


def test_what_length_predicts_of_pairs_is_said_beside_reward_accuracy():
    found = figures(0.7, 0.6, 0.8, implicit=rate(0.88, 0.8, 0.95))
    found["baselines"]["implicit"] = {"shorter": {"mean": 1.0, "low": 0.95, "high": 1.0}, "shuffled": ODDS}
    said = second_opinions(typed(found))
    assert said[-1] == (
        "implicit: the guess that the shorter response is the chosen one is right more often: 100% (95 % interval 95% to 100%)."
    )
    table = next(section for section in sections(typed(found)) if section.title == "Without any training")
    row = table.rows[1]
    assert [str(cell) for cell in row] == [
        "implicit",
        "0.88",
        "1.00 (0.95 to 1.00)",
        "-",
        "-",
        "-",
        "0.50 (0.40 to 0.60)",
    ]
    assert row[2].tone == "down"


def test_judges_that_are_models_are_said_not_to_have_been_asked():
    found = figures(0.7, 0.6, 0.8, **{"llm:x": rate()})
    found["baselines"]["llm:x"] = {"shorter": ODDS, "longer": ODDS}
    table = next(section for section in sections(typed(found)) if section.title == "Without any training")
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
    assert "Win rates by how responses ended" not in [section.title for section in sections(typed(found))]


def test_a_curve_of_what_was_not_logged_is_left_out(tmp_path):
    run = write(Run(tmp_path / "run"))
    rows = {name: [0, 1] if name == "step" else [None if "logps" in name else 0.5] * 2 for name in METRICS.names}
    write_table(run.metrics, pa.table(rows, schema=METRICS))
    write_report(run, Config.model_validate({"data": {"path": "x"}}), typed(figures()), [], {})
    page = run.report.read_text()
    assert "Log-probabilities of the responses" not in page
    assert page.count("<svg") == 5


def test_kl_that_lies_in_the_end_is_said():
    found = figures(0.7, 0.6, 0.8)
    assert "20% of the policy's KL lies in the token that ends a response." in cautions(typed(found))
    found["cost"]["policy"]["positions"][0]["sampled"] = 60.0
    assert not any("ends a response" in line for line in cautions(typed(found)))


def test_estimates_and_positions_of_kl_are_tables():
    found = {section.title: section for section in sections(typed(figures()))}
    assert found["KL by three estimates"].rows == [["policy", "sampled", "30.000", "25.000 to 35.000", "2.500", "1.00"]]
    assert found["KL by position"].rows == [
        ["policy", "1 to 8", "320", "24.000", "80%", "20.000", "100%"],
        ["policy", "end token", "36", "6.000", "20%", "-", "-"],
    ]
