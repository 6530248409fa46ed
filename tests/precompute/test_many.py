"""A job that processes share: every group is had by one of them, and what fails is tried again, by prompts, and left out by name."""

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.artifacts.schemas import MISSING
from pipeline.config.files import load_config
from pipeline.errors import CheckError, ConfigError, DataError, RefscoreError
from pipeline.precompute.many import attempts, claimed, worker
from pipeline.precompute.many.attempts import Claims, next_attempt, planning
from pipeline.precompute.many.claimed import score_claimed, write_job
from pipeline.precompute.many.job import Job, Result
from pipeline.precompute.many.worker import Worker
from pipeline.precompute.plan import make_plan
from pipeline.precompute.score import Target, shards_of, sorted_shards
from pipeline.progress import SILENT
from tests.conftest import experiment, preference_rows, write_rows
from tests.precompute.scoring import not_in_an_index, tables_of


@pytest.fixture(params=["directory", "URL"])
def place(request, tmp_path):
    return str(tmp_path / "job") if request.param == "directory" else f"memory://{tmp_path.name}/job"


@pytest.fixture(autouse=True)
def _in_no_hurry(monkeypatch):
    monkeypatch.setattr(attempts, "_LOOK", 0.01)


@pytest.fixture
def plan(tmp_path, tiny_model):
    data = write_rows(tmp_path / "d.jsonl", preference_rows(8))
    return make_plan(load_config(experiment(tmp_path, tiny_model, data), ["reference.tokens_per_shard=300"]))


@pytest.fixture
def job(plan, place):
    job = Job(place)
    write_job(plan.reference, job, shards_of(plan.reference, tables_of(plan)))
    return job


class Engine:
    """Scores by the ids alone; breaks down over prompts in `fails`."""

    def __init__(self, fails=lambda request: False):
        self.fails, self.asked, self.closed = fails, [], 0

    def ready(self, longest):
        return self

    def score(self, sequences):
        self.asked.append(len(sequences))
        if any(map(self.fails, sequences)):
            raise RuntimeError("device-side assert")
        return [-np.asarray(item.response_ids, dtype=np.float32) / 100 for item in sequences]

    def close(self):
        self.closed += 1


def work(job, plan, engine, groups=None):
    """Score groups as an actor does; returns what came of each."""
    one = Worker(job, Target(plan.reference, plan.store), engine)
    results = []
    for group in groups or job.names("missing"):
        while (result := job.result(group)) is None:
            taken = one.take(next_attempt(job, group))
            if (scores := one.score(taken)) is not None:
                result = one.publish(taken, scores)
        results.append(result)
    return results


def missing_keys(plan):
    return set(plan.keys.take(pa.array(plan.store.lookup(plan.keys).missing)).to_pylist())


def test_a_job_holds_what_the_plan_lacks(job, plan):
    assert len(job.names("missing")) == job.groups() > 2
    tables = [job.missing(group) for group in job.names("missing")]
    assert all(table.schema.equals(MISSING) for table in tables)
    (whole,) = [pa.concat_tables(sorted_shards(pa.concat_tables(tables_of(plan)), 300, 300))]
    assert pa.concat_tables(tables).equals(whole)
    assert job.reference_id() == plan.identity.reference_id
    with pytest.raises(ConfigError, match="holds a job already"):
        write_job(plan.reference, job, iter([]))


def test_a_job_that_is_broken_off_is_complete_with_what_was_written(plan, place):
    def shards():
        yield from islice(shards_of(plan.reference, tables_of(plan)), 2)
        raise KeyboardInterrupt

    job = Job(place)
    with pytest.raises(KeyboardInterrupt):
        write_job(plan.reference, job, shards())
    assert job.groups() == len(job.names("missing")) == 2


PLANNER = """
import os, sys
from pipeline.precompute.many.attempts import planning
from pipeline.precompute.many.job import Job
with planning(Job(sys.argv[1]), "id"):
    os._exit(1)
"""


def test_nobody_waits_for_a_plan_whose_process_is_gone(tmp_path):
    job = Job(str(tmp_path / "job"))
    subprocess.run([sys.executable, "-c", PLANNER, job.place], check=False)
    assert job.groups() is None
    with (
        Claims(job) as claims,
        pytest.raises(RefscoreError, match=r"planned it is gone.*with another place plans what is left"),
    ):
        list(claims.attempts())


def test_a_plan_is_waited_for_as_long_as_its_process_gives_signs_of_life(job, monkeypatch):
    monkeypatch.setattr(attempts, "_BEAT", 0.05)
    other = Job(f"{job.place}-2")
    with planning(other, "id"), Claims(other) as claims:
        note = other.read("plan.json")
        # on another machine: it cannot be asked whether it runs
        monkeypatch.setattr(attempts, "has_ended", lambda _: None)
        monkeypatch.setattr(attempts, "_DEAD_AFTER", 1.0)
        for _ in range(30):
            claims._must_be_planned()
            time.sleep(0.05)
        assert other.read("plan.json")["beat"] > note.get("beat", 0)
    with Claims(other) as claims, pytest.raises(RefscoreError, match="planned it is gone"):
        list(claims.attempts())


def test_a_sign_of_life_that_could_not_be_left_is_left_the_next_time(job, monkeypatch, caplog):
    monkeypatch.setattr(attempts, "_BEAT", 0.02)
    with Claims(job) as claims:
        (attempt,) = islice(claims.attempts(), 1)
        told, put = threading.Event(), Job.put

        def failing(job, name, content):
            if "no space" not in caplog.text:
                raise RefscoreError("no space left")
            put(job, name, content)
            told.set()

        monkeypatch.setattr(Job, "put", failing)
        assert told.wait(20)
    assert job.read(f"claims/{attempt.group}.1.json")["beat"]


@pytest.mark.parametrize("content", ["", "[1]", "null", "{", '{"who": 3}', '{"who": {"pid": 1}}', '{"state": []}'])
def test_damaged_notes_of_a_job_say_nothing(job, content, monkeypatch):
    for name in ("claims/00000000.1.json", "complete.json", "done/00000001.json"):
        job._files.pipe_file(f"{job._root}/{name}", content.encode())
    assert job.groups() is None
    assert job.result("00000001") is None
    monkeypatch.setattr(attempts, "_DEAD_AFTER", 0.1)
    with Claims(job) as claims:
        left = {attempt.group: attempt for attempt in islice(claims.attempts(), len(job.names("missing")) - 1)}
    assert (left["00000000"].number, left["00000000"].failed_at) == (2, [])


def test_a_note_is_whole_or_not_there(job, monkeypatch):
    """Whoever reads it while it is written finds the one before, and never half of one."""
    if not job._local:
        return
    job.put("note.json", {"beat": 1})
    seen, write = [], Path.write_bytes

    def halfway(path, content):
        done = write(path, content[: len(content) // 2])
        seen.append((job.read("note.json"), job.result("00000000"), job.names("done")))
        return write(path, content) if done else done

    monkeypatch.setattr(Path, "write_bytes", halfway)
    job.put("note.json", {"beat": 2})
    assert job.put_new("done/00000000.json", {"sequences": 1, "tokens": 1, "left_out": {}, "failures": 0})
    assert not job.put_new("done/00000000.json", {"sequences": 2, "tokens": 1, "left_out": {}, "failures": 0})
    assert seen[:2] == [({"beat": 1}, None, []), ({"beat": 2}, None, [])]
    assert job.result("00000000").sequences == 1
    assert not list(Path(job.place).glob(".tmp-*"))


def test_where_files_cannot_be_made_on_condition_a_claim_is_still_respected(tmp_path, monkeypatch):
    job = Job(f"memory://{tmp_path.name}/job")
    pipe = type(job._files).pipe_file

    def without_conditions(files, path, value, mode="overwrite", **rest):
        if mode == "create":
            raise NotImplementedError
        return pipe(files, path, value, mode=mode, **rest)

    monkeypatch.setattr(type(job._files), "pipe_file", without_conditions)
    job.begin("id")
    with pytest.raises(ConfigError, match="holds a job already"):
        job.begin("id")
    assert next_attempt(job, "00000000").number == 1
    assert next_attempt(job, "00000000").number == 2


def test_a_job_that_is_removed_meanwhile_is_said(tmp_path):
    job = Job(str(tmp_path / "job"))
    job.begin("id")
    attempt = next_attempt(job, "00000000")
    job.remove()
    with pytest.raises(RefscoreError, match="cannot be read or written"):
        attempt.publishes()
    with pytest.raises(RefscoreError, match="cannot be read or written"):
        job.missing("00000000")


def test_no_job_is_said(tmp_path):
    with pytest.raises(DataError, match="holds no job: 'refscore precompute --plan-to"):
        Job(str(tmp_path / "nowhere")).reference_id()
    with pytest.raises(ConfigError, match="gone://"):
        Job("gone://bucket/job")


def test_a_group_whose_file_is_damaged_is_said_with_the_way_out(job):
    with job._files.open(f"{job._root}/missing/{job.group(0)}.parquet", "wb") as file:
        file.write(b"half of it")
    with pytest.raises(DataError, match=r"missing/00000000\.parquet is damaged .*write the job anew"):
        job.missing(job.group(0))


def test_two_that_claim_never_have_the_same_group(job):
    """Threads stand for processes: each has claims of its own."""
    had = [[] for _ in range(4)]

    def claim(number):
        with Claims(job) as claims:
            for attempt in claims.attempts():
                had[number].append(attempt.group)
                job.put_new(f"done/{attempt.group}.json", {})
                claims.end(attempt)

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(group for groups in had for group in groups) == job.names("missing")


def test_what_is_in_hand_at_the_end_is_given_up_and_no_failure(job):
    with Claims(job) as claims:
        (attempt,) = islice(claims.attempts(), 1)
        attempt.scores(None)
    again = next_attempt(job, attempt.group)
    assert (again.number, again.failed_at) == (2, [])


def claimed_by_another(job, code):
    """A process claims the first group, works on it, and ends."""
    script = (
        "import sys; from pipeline.precompute.many.attempts import next_attempt; from pipeline.precompute.many.job import Job; "
        f"attempt = next_attempt(Job(sys.argv[1]), '00000000'); {code}"
    )
    subprocess.run([sys.executable, "-c", script, job.place], check=True)


@pytest.mark.parametrize("place", ["directory"], indirect=True)
@pytest.mark.parametrize(("code", "failed_at"), [("pass", []), ("attempt.scores(3)", [3]), ("attempt.publishes()", [])])
def test_the_claim_of_a_process_that_is_gone_is_taken_over(job, code, failed_at):
    claimed_by_another(job, code)
    with Claims(job) as claims:
        found = {attempt.group: attempt for attempt in islice(claims.attempts(), job.groups())}
        assert sorted(found) == job.names("missing")
        assert (found["00000000"].number, found["00000000"].failed_at) == (2, failed_at)


def test_a_claim_from_another_machine_is_taken_over_when_it_gives_no_sign_of_life(job, monkeypatch):
    elsewhere = next_attempt(job, "00000000")
    elsewhere.note["who"]["machine"] = "another"
    elsewhere.scores(None)
    with Claims(job) as claims:
        found = []
        for attempt in claims.attempts():
            found.append(attempt)
            if len(found) == job.groups() - 1:
                break
        assert "00000000" not in {attempt.group for attempt in found}
        # it lives as long as its beat changes
        monkeypatch.setattr(attempts, "_DEAD_AFTER", 0.2)
        for _ in range(30):
            elsewhere.live()
            assert claims._claim("00000000", 1) is None
        (late,) = islice(claims.attempts(), 1)
        assert (late.group, late.number, late.failed_at) == ("00000000", 2, [None])


def test_every_group_is_published_and_counted(job, plan):
    results = work(job, plan, Engine())
    assert sum(result.sequences for result in results) == 16
    assert sum(result.tokens for result in results) == plan.missing_tokens
    assert not [result for result in results if result.left_out or result.failures]
    assert not missing_keys(plan)
    # who comes later finds what came of it
    assert work(job, plan, Engine(fails=lambda _: True)) == results


def test_a_prompt_that_breaks_the_engine_twice_is_left_out_by_name_and_nothing_else(job, plan, caplog):
    bad = job.missing("00000001")["prompt_ids"][0].as_py()
    engine = Engine(fails=lambda request: list(request.prompt_ids) == bad)
    results = work(job, plan, engine)
    left_out = {key: why for result in results for key, why in result.left_out.items()}
    rows = [row for group in job.names("missing") for row in job.missing(group).to_pylist() if row["prompt_ids"] == bad]
    assert left_out.keys() == {row["key"].hex() for row in rows}
    assert all("broke down while it scored this prompt" in why for why in left_out.values())
    assert missing_keys(plan) == {row["key"] for row in rows}
    # the engine was started again each time, and asked for the others of that group one by one
    assert engine.closed == sum(result.failures for result in results) >= 2
    assert "device-side assert" in caplog.text


def test_of_a_group_that_always_fails_what_is_left_is_left_out(job, plan):
    for _ in range(worker._MOST_FAILURES + 1):
        attempt = next_attempt(job, "00000000")
        attempt.scores(None)
        attempt.failed()
    engine = Engine()
    (result,) = work(job, plan, engine, ["00000000"])
    assert len(result.left_out) == result.sequences > 0
    assert engine.asked == []


def test_what_was_published_before_a_failure_is_not_scored_again(job, plan):
    one = Worker(job, Target(plan.reference, plan.store), Engine())
    taken = one.take(next_attempt(job, "00000000"))
    plan_target = Target(plan.reference, plan.store)
    plan_target.publish(taken.rows, one.score(taken))  # and the process died before it said so
    engine = Engine()
    (result,) = work(job, plan, engine, ["00000000"])
    assert engine.asked == []
    assert (result.sequences, result.left_out) == (len(taken.whole), {})


def test_prompts_side_by_side_that_break_the_engine_are_no_fault_of_the_engine(tmp_path, tiny_model, place):
    data = write_rows(tmp_path / "d.jsonl", preference_rows(8))
    plan = make_plan(load_config(experiment(tmp_path, tiny_model, data), ["reference.tokens_per_shard=9999"]))
    job = Job(place)
    write_job(plan.reference, job, shards_of(plan.reference, tables_of(plan)))
    prompts = list(dict.fromkeys(map(tuple, job.missing("00000000")["prompt_ids"].to_pylist())))
    bad = set(prompts[:3])
    # too long for it: a part of such a prompt is not
    engine = Engine(fails=lambda request: tuple(request.prompt_ids) in bad)
    (result,) = work(job, plan, engine)
    assert (len(result.left_out), result.failures) == (6, 4)
    assert len(missing_keys(plan)) == 6


def test_what_was_published_by_a_process_that_died_before_it_said_so_is_not_scored_again(job, plan):
    one = Worker(job, Target(plan.reference, plan.store), Engine())
    taken = one.take(next_attempt(job, "00000000"))
    scores = one.score(taken)
    taken.attempt.publishes()
    Target(plan.reference, plan.store).publish(taken.rows, scores)
    engine = Engine()
    (result,) = work(job, plan, engine, ["00000000"])
    assert (engine.asked, result.sequences, result.failures) == ([], len(taken.whole), 0)


def test_an_engine_that_breaks_down_over_everything_stops_the_process(job, plan):
    with pytest.raises(
        RefscoreError, match=r"broke down 3 times in a row \(device-side assert\), and over a single token"
    ):
        work(job, plan, Engine(fails=lambda _: True))
    assert len(missing_keys(plan)) == 16


def test_scores_that_cannot_be_true_stop_the_process(job, plan, monkeypatch):
    engine = Engine()
    monkeypatch.setattr(engine, "score", lambda sequences: [np.ones(len(one.response_ids)) for one in sequences])
    with pytest.raises(CheckError, match="cannot be true"):
        work(job, plan, engine)


class Heard:
    """A listener that keeps what it hears of progress."""

    def __init__(self):
        self.begun, self.ticks = [], []

    def say(self, text): ...

    @contextmanager
    def progress(self, title, total, done=0):
        self.begun.append((total, done))
        self.started = time.monotonic()
        yield self

    def expect(self, total, *, about): ...

    def advance(self, units, text):
        self.ticks.append((units, text))


def test_what_others_did_before_is_no_speed_of_this_process(job, plan, monkeypatch):
    monkeypatch.setattr(claimed, "_LOOK", -1.0)
    work(job, plan, Engine(), job.names("missing")[:-2])
    heard, before, shares = Heard(), job.groups() - 2, []
    monkeypatch.setattr(claimed, "spent", lambda *asked: shares.append(asked[-1]) or "0.1 of about 0.2")
    reference = replace(plan.reference, config=plan.reference.config.model_copy(update={"price_per_hour": 3.6e6}))
    score_claimed(reference, job, None, heard)
    assert heard.begun == [(job.groups(), before)]
    assert [units for units, _ in heard.ticks] == [1, 1]
    # of the two that were left
    assert shares == [0.5, 1.0]
    assert all(text.endswith("0.1 of about 0.2 spent here") for _, text in heard.ticks)


def test_groups_are_not_counted_for_every_one_that_is_done(job, plan, monkeypatch):
    listed, names = [], Job.names
    monkeypatch.setattr(Job, "names", lambda job, folder: listed.append(folder) or names(job, folder))
    with Heard().progress("scoring", 4) as ticker:
        told = claimed._Told(plan.reference, job, ticker, 0)
        for _ in range(20):
            told.on_group(Result(2, 100, {}, 0))
    assert listed == ["done"]


def test_processes_that_claim_score_all_and_find_it_done(job, plan):
    one = score_claimed(plan.reference, job, None, SILENT)
    assert (one.own, one.groups, one.sequences, one.left_out) == (job.groups(), job.groups(), 16, {})
    # and nobody need read a shard to know
    assert not not_in_an_index(plan.store)
    other = score_claimed(plan.reference, job, None, SILENT)
    assert (other.own, other.groups) == (0, job.groups())
    assert not missing_keys(plan)


def test_a_process_that_was_killed_leaves_no_word_of_an_engine_that_hung(tmp_path):
    script = (
        "import os, signal; from pipeline.precompute.many import worker; "
        "guard = worker.answering(99, None); guard.__enter__(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script], check=False, cwd=tmp_path)
    assert list(tmp_path.glob("data/cache/hung-*.txt"))
    with worker.answering(99, None):
        worker._sweep_hung()
        (here,) = tmp_path.glob("data/cache/hung-*.txt")
        assert f"-{os.getpid()}-" in here.name
    assert not list(tmp_path.glob("data/cache/hung-*.txt"))


HANGING = """
import sys, time
from pathlib import Path
from pipeline.precompute.many import worker
from pipeline.precompute.many.attempts import next_attempt
from pipeline.precompute.many.job import Job
worker._GRACE = 1
attempt = next_attempt(Job(sys.argv[1]), "00000000")
attempt.scores(5)
with worker.answering(0.5, attempt):
    if sys.argv[2] == "in Python":
        time.sleep(60)
    import ctypes
    ctypes.PyDLL(None).sleep(60)  # and never lets go of the interpreter
"""


@pytest.mark.parametrize("place", ["directory"], indirect=True)
@pytest.mark.parametrize("how", ["in Python", "in C"])
def test_an_engine_that_hangs_takes_its_process_with_it(job, tmp_path, how):
    done = subprocess.run(
        [sys.executable, "-c", HANGING, job.place, how],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 1
    (where,) = tmp_path.glob("data/cache/hung-*.txt")
    worker._sweep_hung()
    assert f"line {12 if how == 'in Python' else 14}" in where.read_text()
    note = json.loads((tmp_path / "job/claims/00000000.1.json").read_text())
    assert note["at"] == 5
    if how == "in Python":
        assert note["state"] == "failed"
        assert "counts as hung" in done.stderr
    with Claims(job) as claims:
        found = {attempt.group: attempt for attempt in islice(claims.attempts(), job.groups())}
    assert found["00000000"].failed_at == [5]
