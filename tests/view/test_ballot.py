"""Votes by requests: what is refused, what is written, and that a ballot does not say who wrote which."""

import json
from collections import Counter

import pytest
from starlette.testclient import TestClient

from pipeline.artifacts.runs import RUNS, Run
from pipeline.evaluation.votes import Votes, ballots, vote_figures
from pipeline.view.server import application
from tests.view.runs import tree, write_samples

TOKEN, PORT = "t" * 32, 7788
# nothing in them says which of the two models it is
TEXTS = [(f"Question {n}?", f"one way, {n}", f"another way, {n}") for n in range(12)]
MODELS = {"model": "policy", "baseline": "reference"}


@pytest.fixture
def run():
    # what a vote needs of a run, and no more: there are many tests
    made = Run(RUNS / "one")
    made.directory.mkdir(parents=True)
    made.config.touch()
    write_samples(made, 12, 1, texts=TEXTS)
    return made


@pytest.fixture
def client(run):
    cookies = {f"refscore-{PORT}": TOKEN}
    # an error of the server is an answer with 500 here, as for a browser
    return TestClient(
        application(TOKEN, PORT), f"http://127.0.0.1:{PORT}", raise_server_exceptions=False, cookies=cookies
    )


def ballot(client, voter="anna", seed=0, **models):
    return client.get("/ballot", params={"run": "one", "voter": voter, "seed": seed, **MODELS, **models})


def vote_on(shown, voter="anna", seed=0, **changes):
    """A vote on the ballot that was shown."""
    content = {
        "run": "one",
        "voter": voter,
        "seed": seed,
        **MODELS,
        "version": shown["version"],
        "number": shown["number"],
    }
    return content | {"choice": "first", "note": "", "seconds": 1.5} | changes


def test_votes_are_written_down_and_the_next_ballot_comes(client, run):
    listed = ballots(run, 0)
    shown = ballot(client).json()
    for number, choice in enumerate(("first", "second", "tie", "skip")):
        assert (shown["number"], shown["answered"], shown["ballots"]) == (number, number, 12)
        texts = listed[number].prompt, listed[number].first, listed[number].second
        assert (shown["prompt"], shown["first"], shown["second"]) == texts
        answer = client.post("/votes", json=vote_on(shown, choice=choice, note=f"note {number}"))
        assert answer.status_code == 200
        shown = answer.json()
    given = list(Votes(run, "anna").given().values())
    assert [vote.choice for vote in given] == ["first", "second", "tie", "skip"]
    assert [vote.note for vote in given] == [f"note {number}" for number in range(4)]
    assert [vote.seconds for vote in given] == [1.5] * 4
    for number, vote in enumerate(given):
        assert vote.first_is_model is listed[number].first_is_model
        # who wrote the first response, by the text itself
        assert vote.first_is_model is vote.first.startswith("one way")
    figures = vote_figures(run)["voters"][0]
    decided = [(vote.choice == "first") == vote.first.startswith("one way") for vote in given[:2]]
    assert (figures["wins"], figures["losses"], figures["ties"], figures["skips"]) == (
        *(decided.count(one) for one in (True, False)),
        1,
        1,
    )


def test_a_ballot_is_blind_and_shuffled(client, run):
    firsts = Counter()
    for seed in range(8):
        shown = ballot(client, seed=seed)
        assert not [name for name in ("policy", "reference", "model", "baseline", "prompt_id") if name in shown.text]
        number = int(shown.json()["prompt"].split()[1].strip("?"))
        firsts[number, shown.json()["first"].startswith("one way")] += 1
    assert len({number for number, _ in firsts}) > 3  # the order is another one by each seed
    assert len({model_first for _, model_first in firsts}) == 2  # and so are the sides
    assert ballot(client, "bert", 3).json() == ballot(client, "anna", 3).json()


def test_the_last_vote_can_be_taken_back(client, run):
    shown = ballot(client).json()
    second = client.post("/votes", json=vote_on(shown)).json()
    client.post("/votes", json=vote_on(second, choice="second"))
    back = client.post("/votes", json={"run": "one", "voter": "anna", "seed": 0, **MODELS, "take_back": True})
    assert (back.status_code, back.json()["number"], back.json()["answered"]) == (200, 1, 1)
    assert [vote.choice for vote in Votes(run, "anna").every()] == ["first"]
    for answered in (0, 0):  # more than there are is no error
        back = client.post("/votes", json={"run": "one", "voter": "anna", "seed": 0, **MODELS, "take_back": True})
        assert (back.status_code, back.json()["answered"]) == (200, answered)


def test_after_the_last_there_is_no_ballot(client, run):
    shown = ballot(client).json()
    for _ in range(12):
        shown = client.post("/votes", json=vote_on(shown)).json()
    assert (shown["number"], shown["answered"]) == (None, 12)
    assert client.post("/votes", json=vote_on(shown)).status_code == 409


HUGE = 10**400
WRONG = [
    ({"version": ""}, "the samples were replaced since this page was loaded"),
    ({"version": None}, "the samples were replaced"),
    ({"version": ["x"]}, "the samples were replaced"),
    *(({"number": number}, "there is no ballot") for number in (-1, 12, 10**9, HUGE)),
    *(({"number": number}, "number of a vote is a whole number") for number in (None, True, 1.0, "0", [0])),
    *(({"seed": seed}, "seed of a vote is a whole number") for seed in (None, "0", 0.5, False)),
    *(({"choice": choice}, "a vote says one of first, second, tie, skip") for choice in (None, "", "third", 1, ["first"], {})),
    *(({"seconds": seconds}, "seconds") for seconds in ("1", True, [], -1, float("nan"), float("inf"), HUGE)),
    *(({"voter": voter}, "letters, digits") for voter in ("", "../anna", "/etc/x", ".anna", "a/b", "a\x00b", "a\nb", "a" * 65, "é", "\ud800", "anna ")),
    *(({name: value}, f"{name} of a vote is a text") for name in ("voter", "note", "model", "baseline") for value in (None, 1, ["anna"], {})),
    ({"model": "../x"}, "holds no responses of ../x"),
    ({"model": "reference"}, "cannot be compared with itself"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "problem"), WRONG, ids=range(len(WRONG)))
def test_what_is_no_vote_is_refused_and_nothing_is_written(client, run, changes, problem):
    content = vote_on(ballot(client).json(), **changes)
    before = tree(run.directory)
    answer = client.post("/votes", content=json.dumps(content), headers={"Content-Type": "application/json"})
    assert answer.status_code == 409, answer.text[:200]
    assert problem in answer.json()["problem"]
    assert tree(run.directory) == before


def test_responses_that_were_replaced_meanwhile_take_no_vote(client, run):
    shown = ballot(client).json()
    write_samples(run, 12, 1, texts=[("other", "new one", "new other")])
    answer = client.post("/votes", json=vote_on(shown))
    assert answer.status_code == 409
    assert "load it again, the vote is not counted" in answer.json()["problem"]
    assert not run.votes.exists()
    assert ballot(client).json()["prompt"] == "other"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "application/jsonx", "text/plain; application/json"])  # fmt: skip
def test_a_form_of_another_site_is_no_vote(client, run, kind):
    content = json.dumps(vote_on(ballot(client).json()))
    answer = client.post("/votes", content=content, headers={"Content-Type": kind})
    assert answer.status_code == 415
    assert not run.votes.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "1", "null", "NaN", "[" * 60_000, '{"a":' * 10_000, "1" * 5000, b"\xff\xfe{}", b"\x00"], ids=range(12))  # fmt: skip
def test_what_is_no_object_is_refused(client, run, content):
    answer = client.post("/votes", content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.text) == (400, "a vote is a JSON object\n")
    assert not run.votes.exists()


def test_a_vote_is_not_large(client, run):
    shown = ballot(client).json()
    content = json.dumps(vote_on(shown, note="n" * 70_000))
    for sent in (
        content,
        iter([content[:40_000].encode(), content[40_000:].encode()]),
    ):  # with its length, and in pieces
        answer = client.post("/votes", content=sent, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413
    assert not run.votes.exists()
    assert client.post("/votes", json=vote_on(shown, note="n" * 4000)).status_code == 200


@pytest.mark.parametrize(
    "name", ["..", "../../secret", "none", "", "one/", ".one", 1, None, ["one"], {"a": 1}, "one\x00"]
)
def test_a_vote_is_on_a_run_that_is_here(client, run, name):
    content = vote_on(ballot(client).json(), run=name)
    assert client.post("/votes", json=content).status_code == 404
    assert client.post("/votes", json=content | {"take_back": True}).status_code == 404
    assert not run.votes.exists()


def test_hostile_notes_and_texts_are_kept_as_they_are(client, run):
    note = "<script>\u202e\x00\n\u2028 \ud800"
    answer = client.post("/votes", content=json.dumps(vote_on(ballot(client).json(), note=note)), headers={"Content-Type": "application/json"})  # fmt: skip
    assert answer.status_code == 200
    lines = Votes(run, "anna").path.read_bytes().splitlines()
    assert len(lines) == 1
    assert json.loads(lines[0])["note"] == note.replace("\ud800", "\ufffd")


def test_a_file_of_votes_with_a_number_larger_than_any_float_is_a_message(client, run):
    client.post("/votes", json=vote_on(ballot(client).json()))
    path = Votes(run, "anna").path
    path.write_text(path.read_text().replace('"seconds": 1.5', f'"seconds": {HUGE}'))
    for answer in (ballot(client), client.get("/data/runs/one/votes/0.json")):
        assert answer.status_code == 409, answer.text
        assert "anna.jsonl" in answer.json()["problem"]
