"""The report is self-contained, says what the figures say, and nothing a model writes can act in it."""

import json
import re
from itertools import pairwise

import pyarrow as pa
import pytest

from pipeline.artifacts.markdown import plain
from pipeline.artifacts.runs import Run
from pipeline.artifacts.schemas import DROPPED, METRICS
from pipeline.artifacts.tables import write_table
from pipeline.config.experiment import Config
from pipeline.report.addresses import dropped, prompt, training
from pipeline.report.page import write_report
from tests.report.evaluations import figures, typed, write


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write(Run(tmp_path_factory.mktemp("report") / "run"))


def test_hostile_text_is_escaped_everywhere(run):
    page = run.report.read_text()
    for needle in ("<script", "<img", "<iframe", "<b>x", "<i>well", "a<b>", "a/<b>", "<base", '<a href="javascript'):
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
    of_responses = {("responses" if name == "pairs" else name): value for name, value in found.items()}
    (other.directory / "verify.json").write_text(json.dumps(of_responses))
    assert "20 responses (not passed)" in write(other).report.read_text()
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


def test_markdown_is_the_same_in_tables_and_shows_marks_as_they_are(run):
    text = run.report_markdown.read_text()
    assert text.splitlines()[2].startswith("**The policy is better than the reference: rule:no\\_repetition")
    assert "| rule:no\\_repetition | 40 | 0.700 | 0.600 to 0.800 |" in text
    assert plain("a|b\n<img> [x](y)") == "a\\|b \\<img\\> \\[x\\](y)"


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


def test_a_curve_of_what_was_not_logged_is_left_out(tmp_path):
    run = write(Run(tmp_path / "run"))
    rows = {name: [0, 1] if name == "step" else [None if "logps" in name else 0.5] * 2 for name in METRICS.names}
    write_table(run.metrics, pa.table(rows, schema=METRICS))
    write_report(run, Config.model_validate({"data": {"path": "x"}}), typed(figures()), [], {})
    page = run.report.read_text()
    assert "Log-probabilities of the responses" not in page
    assert page.count("<svg") == 5


def test_the_page_says_once_how_its_links_open_and_names_files_beside_them(run):
    page = run.report.read_text().replace("&amp;", "&")
    assert page.count("refscore view") == 1
    assert "runs on this machine at port 7788" in page
    for file in ("judgements.parquet", "samples.parquet", "kl.parquet", "metrics.parquet", "provenance.json"):
        assert file in page
    assert f'href="{prompt(run.name, "p", 0)}"' in page
    assert f'href="{training(run.name)}"' in page
    text = run.report_markdown.read_text()
    assert "Rows: judgements.parquet, model = policy, baseline = reference, judge as named" in text


def test_pairs_that_were_left_out_are_counted_and_opened(tmp_path):
    run = write(Run(tmp_path / "run"))
    assert "left out" not in run.report.read_text()
    write_table(run.dropped, pa.Table.from_pylist([{"reason": "empty"}] * 3, schema=DROPPED))
    page = write(run).report.read_text()
    assert f'3 pairs were left out before training (<a href="{dropped(run.name)}">' in page


def test_tables_have_a_name_and_heads(run):
    page = run.report.read_text()
    tables = page.count("<table")
    assert tables == page.count("<caption>") == page.count("<thead") >= 8
    assert page.count("<th ") == page.count('<th scope="')
    assert "<main>" in page
    levels = [int(level) for level in re.findall(r"<h(\d)", page)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
