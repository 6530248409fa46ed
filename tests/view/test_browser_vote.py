"""A vote in a real Chromium: two people, by keys and by buttons, the server killed in the middle; and nothing says who wrote what."""

import json
import signal

import pytest

from pipeline.artifacts.runs import RUNS, Run
from pipeline.evaluation.votes import Votes, vote_figures
from tests.view.browsing import Pages
from tests.view.runs import make_run
from tests.view.served import Served

TEXTS = [(f"Question {n}?", f"one way, {n}", f"another way, {n}") for n in range(10)]
BLIND = ("policy", "reference", "first_is_model", "prompt_id")


@pytest.fixture
def directory(tmp_path, browser):
    make_run(prompts=10, samples=1, texts=TEXTS)
    return tmp_path


class Voter:
    """Somebody who always prefers "one way", the policy's, and looks whether anything gives it away."""

    def __init__(self, browser, served, name):
        self.context = browser.new_context()
        self.context.set_default_timeout(10_000)
        self.pages = Pages(self.context, served.home)
        self.seen = []
        self.pages.tab.on("response", self._look)
        self.pages.tab.goto(served.address)
        self.pages.go(f"runs/one/vote?voter={name}&seed=0")

    def _look(self, response):
        if "/ballot?" in response.url or response.url.endswith("/votes"):
            self.seen.append(response.text())

    @property
    def prefers(self):
        return "first" if self.pages.tab.get_by_label("first response").inner_text().count("one way") else "second"

    def answered(self, count):
        self.pages.until(f"document.getElementById('main').innerText.includes('{count} of 10 answered')")

    def by_keys(self, first, last):
        for number in range(first, last):
            assert not [name for name in BLIND if name in self.pages.tab.content()]
            self.pages.tab.keyboard.press({"first": "1", "second": "2"}[self.prefers])
            self.answered(number + 1)

    def by_buttons(self, first, last):
        for number in range(first, last):
            self.pages.tab.get_by_role("button", name=f"The {self.prefers} is better").click()
            self.answered(number + 1)

    def leave(self):
        assert self.seen
        for content in self.seen:
            assert not [name for name in BLIND if name in content]
        assert self.pages.trouble == []
        self.context.close()


def test_two_people_vote_and_a_kill_in_the_middle_loses_nothing(browser, directory):
    run = Run(RUNS / "one")
    served = Served(directory, "--run", "one", "--vote", "anna")
    assert served.address.endswith("#/runs/one/vote?voter=anna&seed=0")
    anna = Voter(browser, served, "anna")
    anna.by_keys(0, 6)
    served.stop(signal.SIGKILL)
    assert len(Votes(run, "anna").given()) == 6  # each was on the disk before the next was asked
    anna.pages.tab.keyboard.press("1")
    anna.pages.until(
        "document.querySelector('[role=alert]').innerText.includes('Not counted: The server does not answer')"
    )
    assert "6 of 10 answered" in anna.pages.text
    # what the browser said of the server that is gone
    assert all("ERR_CONNECTION_REFUSED" in one for one in anna.pages.trouble)
    anna.pages.trouble.clear()
    anna.leave()

    served = Served(directory, "--run", "one", "--vote", "anna")
    anna, bert = Voter(browser, served, "anna"), Voter(browser, served, "bert")
    anna.answered(6)
    anna.by_keys(6, 10)
    bert.by_buttons(0, 8)
    tab = bert.pages.tab
    tab.get_by_label("a note on this vote").fill("both <b>bad</b>, 0 1 2 s u")  # letters of a note are no votes
    tab.get_by_role("button", name="A tie").click()
    bert.answered(9)
    tab.keyboard.press("s")
    bert.answered(10)
    assert "That was the last." in bert.pages.text
    tab.get_by_role("button", name="Take the last vote back").click()
    bert.answered(9)
    tab.keyboard.press("0")
    bert.answered(10)
    tab.get_by_role("link", name="See what the votes say").click()
    bert.pages.drawn()
    page = bert.pages.text
    anna.leave()
    bert.leave()
    code, _ = served.stop()
    assert code == 0

    for name, choices in (("anna", {"first", "second"}), ("bert", {"first", "second", "tie"})):
        given = list(Votes(run, name).given().values())
        assert len(given) == 10
        assert {vote.choice for vote in given} == choices
        for vote in given:
            if vote.choice != "tie":
                assert (vote.choice == "first") == vote.first.startswith("one way") == vote.first_is_model
    notes = [json.loads(line)["note"] for line in Votes(run, "bert").path.read_text().splitlines()]
    assert [note for note in notes if note] == ["both <b>bad</b>, 0 1 2 s u"]

    figures = vote_figures(run)
    voters = {one["voter"]: one for one in figures["voters"]}
    assert (voters["anna"]["wins"], voters["anna"]["losses"]) == (10, 0)
    assert (voters["bert"]["wins"], voters["bert"]["ties"], voters["bert"]["notes"]) == (8, 2, 1)
    assert f"policy wins {figures['human']['rate']['mean']:.2f}" in page
    assert "2 people voted on 10 of 10 comparisons" in page
    assert "anna and bert" in page
    assert "rule:words" in page


def test_who_votes_is_asked_where_no_name_is_given(pages):
    pages.open("runs/one/vote")
    pages.tab.get_by_label("your name").fill("../nobody")
    pages.tab.get_by_role("button", name="Begin").click()
    assert pages.place == "runs/one/vote"  # such a name is none
    pages.tab.get_by_label("your name").fill("cleo")
    pages.tab.get_by_label("order").fill("3")
    pages.tab.get_by_role("button", name="Begin").click()
    pages.drawn()
    assert pages.place == "runs/one/vote?voter=cleo&seed=3&model=policy&baseline=reference"
    assert "0 of 40 answered" in pages.text
    assert not Run(RUNS / "one").votes.exists()
