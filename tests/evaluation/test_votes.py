"""People's votes on disk: order and sides, kills at any moment, two at once, hostile texts, and files that others touched."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace

import pyarrow as pa
import pytest

from pipeline.artifacts.schemas import SAMPLES
from pipeline.artifacts.tables import read_table, write_table
from pipeline.errors import ConfigError, DataError, RefscoreError
from pipeline.evaluation.votes import Ballot, Votes, ballots, voters
from pipeline.evaluation.votes.people import judged_by_people
from pipeline.evaluation.votes.record import votes_here
from pipeline.judges.annotations import Vote, open_annotations, read_votes
from pipeline.judges.judging import Comparison, Duel, Prompt, Response
from tests.conftest import ROOT
from tests.evaluation.vote_runs import run_of

HOSTILE = [
    "<script>alert(1)</script>",
    "a\nb\r\nc\rd",
    "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg",
    '"quoted"\\ and {"json": 1}',
    "\x00\x01\x1f\x7f",
    "\u202eright to left\u2066",
    "emoji \U0001f642 \U0001f468\u200d\U0001f469",
    "x" * 1_000_000,
]
HALF = "half a character \ud83d, and \udc00 the other"


@pytest.fixture
def run(tmp_path):
    return run_of(tmp_path / "data/runs/r", [(f"mine {n}", f"theirs {n}") for n in range(40)])


def test_order_and_sides_follow_the_seed_and_nothing_else(run):
    asked = ballots(run, seed=1)
    assert [one.number for one in asked] == list(range(40))
    assert asked[3:5] == [asked[3], asked[4]]
    assert asked[-1] == asked[39]
    assert {one.prompt for one in asked} == {f"prompt {n}" for n in range(40)}
    for one in asked:
        sides = (one.first, one.second) if one.first_is_model else (one.second, one.first)
        number = one.prompt.removeprefix("prompt ")
        assert sides == (f"mine {number}", f"theirs {number}")
    assert 10 < sum(one.first_is_model for one in asked) < 30
    assert [one.prompt for one in asked] != [f"prompt {n}" for n in range(40)]
    other = ballots(run, seed=2)
    assert [one.prompt for one in other] != [one.prompt for one in asked]
    sides_of = {one.prompt: one.first_is_model for one in asked}
    assert any(one.first_is_model != sides_of[one.prompt] for one in other)
    # another evaluation of the same samples writes the rows in another order; one prompt fewer moves no other
    table = read_table(run.samples, SAMPLES)
    write_table(run.samples, table.take(pa.array(range(len(table) - 1, -1, -1))))
    assert list(ballots(run, seed=1)) == list(asked)
    write_table(run.samples, table.slice(2))
    fewer = [replace(one, number=0) for one in ballots(run, seed=1)]
    assert fewer == [replace(one, number=0) for one in asked if one.prompt != "prompt 0"]


def test_identical_responses_are_not_asked_about_but_counted(tmp_path):
    run = run_of(tmp_path / "r", [("same", " same\n"), ("\x1cone", "other"), [("a", "b"), ("c", "c")]])
    asked = ballots(run)
    assert (len(asked), asked.identical) == (2, 2)
    assert {one.first for one in asked} | {one.second for one in asked} == {"one", "other", "a", "b"}


def test_what_cannot_be_asked_is_said(run, tmp_path):
    with pytest.raises(ConfigError, match=r"no responses of sonnet; there are: policy, reference"):
        ballots(run, model="sonnet")
    with pytest.raises(ConfigError, match="with itself"):
        ballots(run, model="policy", baseline="policy")
    with pytest.raises(DataError, match=r"samples.parquet does not exist"):
        ballots(replace(run, directory=tmp_path))


def test_a_vote_is_an_annotation_that_judges_can_be_set_against(run):
    asked, votes = ballots(run), Votes(run, "anna.b-1_C")
    for ballot, choice in zip(asked, ("first", "second", "tie", "skip"), strict=False):
        votes.add(ballot, choice, note=f"because {choice}", seconds=1.5)
    rows = [json.loads(line) for line in votes.path.read_text().splitlines()]
    assert votes.path == run.directory / "votes" / "anna.b-1_C.jsonl"
    assert [row["preference"] for row in rows] == [1, 2, 1.5, None]
    assert [row["annotator"] for row in rows] == ["anna.b-1_C"] * 4
    assert rows[0]["note"] == "because first"
    assert rows[0].keys() >= {"time", "prompt_id", "sample"}
    names = ("policy", "reference") if asked[0].first_is_model else ("reference", "policy")
    assert (rows[0]["generator_1"], rows[0]["generator_2"]) == names
    assert read_votes(votes.path) == [
        Vote(one.prompt, one.first, one.second, score) for one, score in zip(asked, (1.0, 0.0, 0.5, None), strict=False)
    ]
    # as the judge `annotations:<file>`, in the order that was seen and in the other
    judge = open_annotations(votes.path, "anna")
    prompt, sides = Prompt("", asked[0].prompt), (Response(asked[0].first, ""), Response(asked[0].second, ""))
    assert judge.prefer([Duel(prompt, *sides), Duel(prompt, *sides[::-1])]) == [1.0, 0.0]
    assert voters(run) == ["anna.b-1_C"]
    given = Votes(run, "anna.b-1_C").given()
    assert list(given) == [one.key for one in asked[:4]]
    assert [one.choice for one in given.values()] == ["first", "second", "tie", "skip"]
    first = given[asked[0].key]
    assert (first.note, first.seconds, first.first_is_model) == ("because first", 1.5, asked[0].first_is_model)


def test_the_last_vote_counts_and_undo_gives_the_one_before_back(run):
    asked, votes = ballots(run), Votes(run, "anna")
    assert votes.undo() is None
    assert not votes.path.exists()
    votes.add(asked[0], "first")
    votes.add(asked[1], "tie")
    votes.add(asked[0], "second")
    assert [(key, one.choice) for key, one in votes.given().items()] == [
        (asked[1].key, "tie"),
        (asked[0].key, "second"),
    ]
    # for every reader of the file
    assert [vote.score for vote in read_votes(votes.path)] == [0.5, 0.0]
    assert votes.undo().choice == "second"
    assert votes.given()[asked[0].key].choice == "first"
    assert [votes.undo().choice for _ in range(2)] == ["tie", "first"]
    assert votes.undo() is None
    assert votes.given() == {}


def test_what_another_process_voted_is_seen(run):
    asked = ballots(run)
    mine, theirs = Votes(run, "anna"), Votes(run, "anna")
    mine.add(asked[0], "first")
    assert len(mine.given()) == 1
    theirs.add(asked[1], "second")
    assert len(mine.given()) == 2
    theirs.undo()
    theirs.undo()
    assert mine.given() == {}


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a b", "a\n", "-a", ".a", "a" * 65, "é", "a\x00", "a\\b", "con:"]
)
def test_a_name_that_is_no_plain_name_is_refused(run, name):
    with pytest.raises(ConfigError, match="up to 64 letters, digits"):
        Votes(run, name)
    assert not (run.directory / "votes").exists()


def test_what_is_no_vote_is_refused_and_leaves_nothing(run):
    asked, votes = ballots(run), Votes(run, "a" * 64)
    for choice, seconds in (("both", None), ("", None), ("first", float("nan")), ("first", -1.0)):
        with pytest.raises(ConfigError):
            votes.add(asked[0], choice, seconds=seconds)
    assert voters(run) == []


def test_hostile_texts_come_back_as_they_were(tmp_path):
    run = run_of(tmp_path / "r", [(f"{text}!", f"?{text}") for text in HOSTILE])
    asked, votes = ballots(run), Votes(run, "anna")
    for ballot in asked:
        votes.add(ballot, "first", note=f"{ballot.second[:99]} {HALF}")
    given = list(Votes(run, "anna").given().values())
    assert [(one.prompt, one.first, one.second) for one in given] == [(b.prompt, b.first, b.second) for b in asked]
    assert [one.note for one in given] == [f"{ballot.second[:99]} {HALF}" for ballot in asked]
    assert [vote.texts for vote in read_votes(votes.path)] == [(b.prompt, b.first, b.second) for b in asked]
    assert len(asked.answered(Votes(run, "anna").given())) == len(HOSTILE)


def test_half_a_character_in_a_response_survives_too(run):
    ballot = Ballot(0, "p", 0, "policy", "reference", HALF, f"{HALF} 1", f"{HALF} 2", first_is_model=True, topic="")
    Votes(run, "anna").add(ballot, "second")
    (given,) = Votes(run, "anna").given().values()
    assert given.texts == (HALF, f"{HALF} 1", f"{HALF} 2")
    assert read_votes(Votes(run, "anna").path)[0].texts == given.texts


@pytest.mark.parametrize("cut", [1, 2, 40, -3, -1, None])
def test_a_torn_line_is_no_vote_and_is_mended_by_the_next(run, cut):
    """`cut`: how much of the third line was written; None: all of it but its end."""
    asked, votes = ballots(run), Votes(run, "anna")
    for ballot in asked[:3]:
        votes.add(ballot, "first")
    lines = votes.path.read_bytes().splitlines(keepends=True)
    torn = lines[2].removesuffix(b"\n")
    votes.path.write_bytes(b"".join(lines[:2]) + (torn[:cut] if cut else torn))
    whole = 3 if cut is None else 2
    assert len(Votes(run, "anna").given()) == whole
    Votes(run, "anna").add(asked[5], "tie")
    assert [one.choice for one in Votes(run, "anna").given().values()] == ["first"] * whole + ["tie"]
    assert votes.path.read_bytes().startswith(b"".join(lines[:whole]))
    assert len(read_votes(votes.path)) == whole + 1


def test_undo_after_a_kill_takes_the_last_whole_vote_back(run):
    asked, votes = ballots(run), Votes(run, "anna")
    votes.add(asked[0], "first")
    votes.add(asked[1], "second")
    with votes.path.open("ab") as file:
        file.write(b'{"instruction": "torn')
    assert votes.undo().key == asked[1].key
    assert list(votes.given()) == [asked[0].key]


@pytest.mark.parametrize("line", ["{}", "[]", "3", "not json", '{"preference": 3}', '"\\ud83d"', "[" * 99_999])
def test_a_line_that_somebody_damaged_is_named_and_keeps_its_neighbours(run, line):
    asked, votes = ballots(run), Votes(run, "anna")
    votes.add(asked[0], "first")
    with votes.path.open("a") as file:
        file.write(f"{line}\n")
    before = votes.path.read_bytes()
    for use in (votes.given, votes.undo, lambda: votes_here(run)):
        with pytest.raises(DataError, match=r"anna.jsonl, line 2: not a vote: mend the line, or delete it"):
            use()
    assert votes.path.read_bytes() == before


def test_places_that_cannot_be_written_are_messages(run):
    asked = ballots(run)
    (run.directory / "votes" / "anna.jsonl").mkdir(parents=True)
    for use in (lambda: Votes(run, "anna").add(asked[0], "first"), Votes(run, "anna").given):
        with pytest.raises(DataError, match=r"anna.jsonl cannot be"):
            use()
    (run.directory / "votes" / "anna.jsonl").rmdir()
    (run.directory / "votes").rmdir()
    (run.directory / "votes").touch()
    for use in (lambda: Votes(run, "anna").add(asked[0], "first"), Votes(run, "anna").given):
        with pytest.raises(DataError, match=r"anna.jsonl cannot be"):
            use()


def test_a_run_that_was_removed_while_it_was_voted_is_not_made_again(run):
    asked, votes = ballots(run), Votes(run, "anna")
    run.directory.rename(run.directory.with_name("elsewhere"))
    with pytest.raises(DataError, match="is gone"):
        votes.add(asked[0], "first")
    assert not run.directory.exists()


def test_on_a_full_disk_nothing_of_a_vote_stays(run, monkeypatch):
    asked, votes = ballots(run), Votes(run, "anna")
    votes.add(asked[0], "first")
    before, write = votes.path.read_bytes(), os.write

    def full(descriptor, line):
        if len(line) < 50:
            raise OSError(28, "No space left on device")
        return write(descriptor, line[: len(line) - 20])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(RefscoreError, match="no space left"):
        votes.add(asked[1], "first")
    monkeypatch.undo()
    assert votes.path.read_bytes() == before
    assert len(votes.given()) == 1


VOTING = """
import os, signal, sys
from pathlib import Path
from pipeline.artifacts.runs import Run
from pipeline.evaluation.votes import Votes, ballots
run, voter, first, number, torn = Run(Path(sys.argv[1])), sys.argv[2], *map(int, sys.argv[3:6])
asked, votes, write = ballots(run), Votes(run, voter), os.write
def half(descriptor, line):
    write(descriptor, line[:torn])
    os.kill(os.getpid(), signal.SIGKILL)
for ballot in asked[first : first + number]:
    if torn and ballot.number == first + number - 1:
        os.write = half
    votes.add(ballot, "second")
    print(ballot.number, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def voting(run, voter, first, number, torn=0):
    """A process that votes and is killed: after its last vote, or when `torn` bytes of that are written."""
    return subprocess.Popen(
        [sys.executable, "-c", VOTING, str(run.directory), voter, str(first), str(number), str(torn)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def killed(child):
    said, problems = child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL, problems
    assert not problems
    return [int(line) for line in said.split()]


def test_two_voters_are_killed_in_the_middle_and_go_on_where_they_were(run):
    """Between votes, and inside one: whatever was said to be counted is there, nothing twice, nothing torn."""
    asked = ballots(run)
    for voter, torn in (("anna", 0), ("ben", 100)):
        said = killed(voting(run, voter, 0, 6, torn))
        assert said == list(range(5 if torn else 6))
        votes = Votes(run, voter)
        done = asked.answered(votes.given())
        assert sorted(done) == said
        for ballot in asked:
            if ballot.number < 10 and ballot.number not in done:
                votes.add(ballot, "first")
        assert sorted(asked.answered(votes.given())) == list(range(10))
        assert len(votes.path.read_text().splitlines()) == 10
    assert voters(run) == ["anna", "ben"]


def test_two_processes_that_vote_under_one_name_lose_nothing(run):
    children = [voting(run, "anna", first, 20) for first in (0, 20)]
    for child in children:
        killed(child)
    given = Votes(run, "anna").given()
    assert len(given) == 40
    assert Counter(one.choice for one in given.values()) == {"second": 40}
    assert len(read_votes(Votes(run, "anna").path)) == 40


def test_a_vote_waits_for_the_one_who_writes(run):
    """The lock is there: while another process holds the file, nothing is appended or cut off."""
    asked, votes = ballots(run), Votes(run, "anna")
    votes.add(asked[0], "first")
    with votes.path.open("ab") as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        file.write(b'{"instruction": "half of what')
        file.flush()
        thread = threading.Thread(target=votes.add, args=(asked[1], "second"))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert votes.path.read_bytes().endswith(b"half of what")
    thread.join(30)
    assert [one.choice for one in votes.given().values()] == ["first", "second"]


def test_a_vote_that_waited_for_a_file_that_is_gone_is_not_lost_unsaid(run):
    asked, votes, said = ballots(run), Votes(run, "anna"), []

    def vote():
        try:
            votes.add(asked[1], "second")
        except DataError as error:
            said.append(str(error))

    votes.add(asked[0], "first")
    with votes.path.open("ab") as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        thread = threading.Thread(target=vote)
        thread.start()
        thread.join(0.3)
        votes.path.unlink()
    thread.join(30)
    assert said == [f"{votes.path} was removed while it was voted: vote again"]


def comparison(prompt, policy, reference, sample=0, prompt_id="p"):
    return Comparison(
        Prompt(prompt_id, prompt), sample, "policy", "reference", Response(policy, "stop"), Response(reference, "stop")
    )


def test_votes_count_for_the_texts_they_were_given_on(run):
    asked, votes = ballots(run), Votes(run, "anna")
    for ballot in asked[:4]:
        votes.add(ballot, "first")
    key = asked[0].prompt_id

    def of(ballot, **changes):
        model = (ballot.first, ballot.second) if ballot.first_is_model else (ballot.second, ballot.first)
        return replace(comparison(ballot.prompt, *model, prompt_id=ballot.prompt_id), **changes)

    # unchanged; another number of the sample; another response; the fourth's prompt is gone
    now = [of(asked[0]), of(asked[1], sample=3), of(asked[2], response=Response("new", "stop"))]
    judgements, people = judged_by_people(votes_here(run), now)
    assert [(one.prompt_id, one.sample, one.judge) for one in judgements] == [
        (key, 0, "human"), (asked[1].prompt_id, 3, "human")
    ]  # fmt: skip
    assert [one.score for one in judgements] == [float(one.first_is_model) for one in asked[:2]]
    assert [one.order for one in judgements] == [
        "policy_first" if one.first_is_model else "reference_first" for one in asked[:2]
    ]
    assert (people.voters, people.votes, people.prompts, people.of_prompts, people.elsewhere) == (1, 2, 2, 3, 2)
    # a vote on new responses replaces none on the old ones: they count again when the old ones come back
    new = replace(asked[0], **{"first" if asked[0].first_is_model else "second": "new"})
    votes.add(new, "tie")
    assert judged_by_people(votes_here(run), now)[0][0].score == float(asked[0].first_is_model)
    assert votes.given()[asked[0].key].choice == "tie"
    assert [vote.score for vote in read_votes(votes.path)] == [1.0] * 4 + [0.5]
    assert sorted(asked.answered(votes.given())) == [1, 2, 3]
    assert judged_by_people({}, now) == ([], None)
    assert judged_by_people({"anna": []}, now) == ([], None)
    skipped = replace(votes.given()[asked[1].key], choice="skip")
    assert judged_by_people({"anna": [skipped]}, now) == ([], None)
