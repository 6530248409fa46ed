"""compare.html and compare.md: the same tables, what runs said of themselves, and nothing that acts."""

from dataclasses import replace

import pytest

from pipeline.evaluation.compare import differences
from pipeline.evaluation.results import read_results, write_results
from pipeline.report.addresses import judged, samples
from pipeline.report.comparison import comparison_sections, write_comparison
from tests.report.evaluations import compared


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    directory = tmp_path_factory.mktemp("comparison")
    runs = compared(directory)
    results = read_results(runs[2].eval)
    write_results(runs[2].eval, replace(results, verdict="<b>no</b> verdict"))
    tables = comparison_sections(runs, differences(runs))
    write_comparison(directory / "compare.html", runs, tables, ["<i>other</i> models"])
    return directory, runs, tables


def test_terminal_page_and_markdown_have_the_same_tables(where):
    directory, _, tables = where
    assert [table.title for table in tables] == [
        "Settings that differ",
        "What they reached",
        "Prompt by prompt, first minus second",
    ]
    page, text = (directory / "compare.html").read_text(), (directory / "compare.md").read_text()
    for table in tables:
        assert f"<caption>{table.title}</caption>" in page
        assert f"#### {table.title}" in text
        assert f"Rows: {table.source}." in page
    assert "| train.beta | 0.7 | 0.6 | 0.5 |" in text
    assert "* \\<i\\>other\\</i\\> models" in text


def test_figures_of_every_run_lead_to_their_rows(where):
    _, runs, tables = where
    rows = {str(row[0]): row[1:] for row in tables[1].rows}
    names = [run.name for run in runs]
    assert [cell.rows for cell in rows["win rate, rule:no_repetition"]] == [
        judged(name, "rule:no_repetition") for name in names
    ]
    assert [cell.rows for cell in rows["responses cut off"]] == [samples(name, model="policy") for name in names]
    assert str(rows["responses cut off"][0]) == "10%, n = 40"
    assert rows["KL to the reference, nats"][0].rows == ""
    judge, first, second, *_ = tables[2].rows[0]
    assert (first.rows, second.rows) == (judged(str(first), judge), judged(str(second), judge))


def test_the_page_says_what_the_runs_said_and_nothing_in_it_acts(where):
    page = (where[0] / "compare.html").read_text()
    assert "which also chose the training pairs and so is no independent judge," in page
    assert "&lt;b&gt;no&lt;/b&gt; verdict" in page
    assert "&lt;i&gt;other&lt;/i&gt; models" in page
    assert "<i>" not in page
    assert "default-src 'none'" in page
    assert page.count("refscore view") == 1


def test_runs_that_were_not_evaluated_have_no_table_and_say_so(where, tmp_path):
    _, runs, _ = where
    runs[0].eval.rename(tmp_path / "eval.json")
    try:
        found = comparison_sections(runs, [])
        assert str(found[1].rows[0][1]) == "-"
        assert found[1].rows[0][1].rows == ""
        write_comparison(tmp_path / "page.html", runs, found, [])
        assert "<strong>first</strong>: not evaluated yet" in (tmp_path / "page.html").read_text()
    finally:
        (tmp_path / "eval.json").rename(runs[0].eval)
