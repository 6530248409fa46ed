"""The folder of pages: served by a plain file server, without any other network, it shows what the server shows."""

import json
import re
import subprocess
import sys

import pytest

from pipeline.artifacts.runs import RUNS, Run
from pipeline.errors import ConfigError
from pipeline.progress import SILENT
from pipeline.view.bundle import MARK, write_bundle
from tests.view.browsing import Pages
from tests.view.runs import make_run, plain_text, prompt_id, tree


def write(runs, to):
    with SILENT.progress("", 1) as ticker:
        return write_bundle(runs, to, ticker)


PLACES = [
    "runs", "runs/one", "runs/one/samples", f"runs/one/prompts/{prompt_id(3)}", "runs/one/pairs", f"runs/one/pairs/{7:012x}",
    "runs/one/training", "runs/one/dropped", "runs/one/votes", "runs/bare", "runs/bare/samples", "runs/bare/training",
    "runs/bare/pairs", "runs/bare/dropped", "runs/bare/votes",
]  # fmt: skip


def bare_run():
    """A run of which nothing but a configuration is there."""
    run = Run(RUNS / "bare")
    run.directory.mkdir(parents=True)
    run.config.write_text("data: {path: 'embedded:demo'}\n")
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bundle")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        # 120 rows: three files of them, as the search reads all
        runs = [make_run(prompts=60), make_run("two", prompts=60, beta=0.3, outcomes="WWTLX-f"), bare_run()]
        make_run("left-out", prompts=2)
        before = tree(directory / "data")
        files, size, problems = write(runs, directory / "pages")
        assert tree(directory / "data") == before
    written = [path for path in (directory / "pages").rglob("*") if path.is_file()]
    # the mark is written twice
    assert (len(written) - files, problems) == (0, [])
    assert abs(sum(path.stat().st_size for path in written) - size) < 200
    return directory / "pages"


@pytest.fixture(scope="module")
def window(folder, browser):
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    home = re.search(r"http://[\d.]+:\d+/", process.stdout.readline())[0]
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(10_000)
    # the rest of the network is not there
    context.route(lambda url: not url.startswith(home), lambda route: route.abort())
    yield context, home
    context.close()
    process.terminate()
    process.wait(30)


@pytest.fixture
def pages(window):
    opened = Pages(*window)
    yield opened
    opened.tab.close()
    assert opened.trouble == []


@pytest.mark.parametrize("place", PLACES)
def test_every_page_is_there_without_the_network(pages, place):
    pages.open(place)
    assert pages.title
    assert "Vote" not in pages.text.replace("Votes on", "")
    if place in ("runs/bare/samples", "runs/bare/pairs"):
        assert re.search("No samples yet|No pairs yet", pages.text)
    else:
        assert pages.title != "This cannot be shown", pages.text
    assert "left-out" not in pages.text


def test_filters_orders_and_the_search_work(pages):
    pages.open("runs/one/samples?judge=rule:words&outcome=won")
    assert pages.rows == [row for row in range(120) if row % 6 == 0][: len(pages.rows)]
    assert "20 of 120 comparisons" in pages.text
    pages.choose("order", "length")
    gains = {row: row * 3 % 37 - row * 4 % 37 for row in range(0, 120, 6)}
    assert pages.rows == sorted(gains, key=lambda row: (-gains[row], row))
    pages.open("runs/one/samples")
    pages.tab.get_by_label("text", exact=True).fill("NEEDLE-11")
    pages.tab.keyboard.press("Enter")
    pages.drawn()
    assert pages.rows == [row for row in range(120) if str(row).startswith("11")]  # in the first and the last file
    pages.press("j", "j", "Enter")
    assert plain_text(110, "policy", 8) in pages.tab.get_by_label("response of policy").inner_text()


def test_the_first_and_the_last_row_of_every_file_are_opened(pages):
    pages.open("runs/one/samples")
    for row in (0, 49, 50, 99, 100, 119):
        pages.go(f"runs/one/prompts/{prompt_id(row // 2)}?of={row % 2}")
        assert plain_text(row, "policy", 8) in pages.tab.get_by_label("response of policy").inner_text()
        # of all five prompts but the last there are tokens
        assert pages.tab.get_by_label("tokens of policy").count() == (row // 2 % 5 != 4)
    for row in (0, 49, 50, 59):
        pages.go(f"runs/one/pairs/{row:012x}")
        assert f"chosen answer {row}, good" in pages.tab.get_by_label("chosen response", exact=True).inner_text()


@pytest.mark.parametrize(("first", "second"), [("one", "two"), ("two", "one")])
def test_runs_side_by_side_with_either_as_the_baseline(pages, first, second):
    pages.open(f"runs?run={first}&run={second}")
    assert f"Difference of scores from {first}, prompt by prompt" in pages.text
    row = pages.tab.locator("table", has_text="Difference of scores").locator("tbody tr", has_text="rule:words")
    value = float(row.locator("td").nth(1).inner_text().replace("\N{MINUS SIGN}", "-").split()[0])
    # "two" wins more, by what was made of it
    assert (value > 0) == (second == "two")
    assert pages.tab.locator("th", has_text="train.beta").count() == 1


def test_nothing_can_be_voted_and_nothing_is_asked_for_again(pages):
    pages.open("runs/one/vote?voter=anna")
    assert "These pages are files, which take no votes" in pages.text
    pages.requests.clear()
    pages.tab.wait_for_timeout(300)
    assert not pages.requests


def test_the_report_goes_along(folder):
    assert (folder / "report" / "one" / "index.html").read_bytes() == (
        folder.parent / "data" / "runs" / "one" / "report.html"
    ).read_bytes()
    assert not (folder / "report" / "bare").exists()


def test_a_second_call_replaces_the_first(tmp_path):
    one, two = make_run("one", prompts=3), make_run("two", prompts=3)
    write([one, two], tmp_path / "pages")
    assert (tmp_path / "pages" / "data" / "runs" / "two").is_dir()
    files, size, _ = write([one], tmp_path / "pages")
    assert not (tmp_path / "pages" / "data" / "runs" / "two").exists()
    assert not (tmp_path / "pages" / "report" / "two").exists()
    assert json.loads((tmp_path / "pages" / MARK).read_text()) == {"runs": ["one"], "files": files, "bytes": size}
    assert [run["name"] for run in json.loads((tmp_path / "pages" / "data" / "runs.json").read_text())["runs"]] == [
        "one"
    ]


def test_a_folder_that_was_cut_off_is_written_anew(tmp_path, monkeypatch):
    run = make_run(prompts=3)

    def full(path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.view.bundle.answer", full)
        with pytest.raises(OSError, match="No space"):
            write([run], tmp_path / "pages")
    assert json.loads((tmp_path / "pages" / MARK).read_text())["files"] is None
    files, _, _ = write([run], tmp_path / "pages")
    assert files > 20


def test_a_directory_of_others_is_left_alone(tmp_path):
    run = make_run(prompts=3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "data").mkdir()
    (tmp_path / "mine" / "data" / "thesis.txt").write_text("mine")
    before = tree(tmp_path / "mine")
    with pytest.raises(ConfigError, match=r"holds data and no refscore-view.json.*name a new or empty directory"):
        write([run], tmp_path / "mine")
    assert tree(tmp_path / "mine") == before
    with pytest.raises(ConfigError, match=r"thesis.txt is no directory"):
        write([run], tmp_path / "mine" / "data" / "thesis.txt")


def test_a_file_that_cannot_be_read_is_said_and_the_rest_is_there(tmp_path):
    run = make_run(prompts=3)
    run.dropped.write_bytes(b"PAR1 no parquet PAR1")
    _, _, problems = write([run], tmp_path / "pages")
    assert len(problems) == 1
    assert problems[0].startswith("runs/one/dropped.json: ")
    assert "cannot be read as Parquet" in problems[0]
    assert (
        "cannot be read"
        in json.loads((tmp_path / "pages" / "data" / "runs" / "one" / "dropped.json").read_text())["problem"]
    )
    assert (tmp_path / "pages" / "data" / "runs" / "one" / "samples" / "0" / "0.json").is_file()
