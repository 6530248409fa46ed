"""With `refscore view` running, the links of a report open the rows that its figures are made of."""

import re
from dataclasses import replace
from urllib.parse import parse_qs, urlsplit

import pytest

from pipeline.artifacts.runs import record
from pipeline.artifacts.schemas import SAMPLES
from pipeline.artifacts.tables import read_table
from pipeline.config.experiment import Config
from pipeline.evaluation.rates.winrates import by_topic
from pipeline.evaluation.results import read_results
from pipeline.report.addresses import PORT
from pipeline.report.page import write_report
from pipeline.report.sections import sections
from tests.report.evaluations import figures, typed
from tests.view.browsing import Pages
from tests.view.runs import make_run, said_of
from tests.view.served import Served


@pytest.fixture(scope="module")
def results():
    """Figures of a run in this directory, whose report is written."""
    run = make_run("linked", prompts=24)
    run.gate.unlink()
    topics = {row["prompt_id"]: row["topic"] for row in read_table(run.samples, SAMPLES).to_pylist()}
    found = replace(
        typed(figures()),
        judges=read_results(run.eval).judges,
        topics={judge: by_topic(said, topics) for judge, said in said_of(run).items()},
    )
    config = Config.model_validate({"data": {"path": "x"}})
    record(run, config, "precompute", reference_id="ab" * 32, digests={})
    write_report(run, config, found, [], {})
    return found


@pytest.fixture(scope="module", autouse=True)
def where(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("links")
        patch.chdir(directory)
        yield directory


@pytest.fixture(scope="module")
def pages(where, results, browser):
    served = Served(where)
    context = browser.new_context()
    context.new_page().goto(served.address)
    yield Pages(context, served.home)
    context.close()
    served.stop()


def open_link(pages, address):
    pages.open(address.removeprefix(f"http://127.0.0.1:{PORT}/#/"))
    return pages.text


def test_a_link_lists_as_many_comparisons_as_its_figure_counts(pages, results):
    policy, by_topics = (
        next(section for section in sections(results, "linked") if section.title == title)
        for title in ("Policy against reference", "By topic")
    )
    seen = 0
    for row in policy.rows:
        for figure in row[6:8]:
            listed = re.search(r"(\d+) of 48 comparisons", open_link(pages, figure.rows))
            assert listed[1] == str(figure).split(" of ")[0]
            seen += 1
    for topic, *cells in by_topics.rows:
        # a judge that said nothing of a topic has no rate there
        for cell in filter(lambda cell: cell.rows, cells):
            # 24 prompts, two samples of each, of three topics, one of which has no name
            assert "16 of 48 comparisons" in open_link(pages, cell.rows), topic
            seen += 1
    assert seen == 14


def judge_of(address):
    return parse_qs(urlsplit(address).fragment.partition("?")[2]).get("judge", [None])[0]


def test_every_link_of_the_page_opens(pages, where, results):
    page = (where / "data/runs/linked/report.html").read_text().replace("&amp;", "&")
    addresses = set(re.findall(r'<a href="([^"]+)"', page))
    # one of each kind: names of judges and topics are alike
    kinds = {
        re.sub(r"(judge|topic)=[^&]*", r"\1", address): address
        for address in sorted(addresses)
        # further figures of the page are of models and judges that the run has not
        if "round1" not in address and judge_of(address) in {None, *results.judges}
    }
    assert len(kinds) >= 9
    for address in kinds.values():
        assert "cannot be shown" not in open_link(pages, address), address
    assert pages.trouble == []
