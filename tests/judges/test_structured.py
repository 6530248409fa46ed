"""Verdicts as JSON: asked for where a server can, read again from what was kept, and given up once where it refuses."""

import json
import logging
import re

import pytest

from pipeline.config.judges import JudgeConfig
from pipeline.judges.asking.completions import verdict_of
from pipeline.judges.asking.verdicts import read_verdict
from pipeline.judges.judging import Comparison, Prompt, Response, judge_both_orders
from pipeline.judges.open import JudgeContext, open_judge
from tests.judges.letter_server import Server
from tests.judges.test_hostile import HOSTILE


@pytest.fixture
def serve():
    servers = []

    def start(**how):
        servers.append(Server(**how))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def items(number, prompt="clear"):
    sides = Response("longer", "stop"), Response("b", "stop")
    return [Comparison(Prompt(str(n), f"{prompt} {n}"), 0, "policy", "reference", *sides) for n in range(number)]


def opened(server, tmp_path, **settings):
    settings = {"verdict": "reasoning", "model": "m", "retries": 0, **settings}
    return open_judge(JudgeConfig(name=f"llm:{server.url}", **settings), JudgeContext(tmp_path / "verdicts"))


def winners(judge, asked):
    return [one.winner for one in judge_both_orders(judge, asked)]


def forms(server):
    return ["response_format" in request for _, request in server.seen]


def test_a_server_that_can_is_asked_for_json_whose_comparison_comes_first_and_what_was_kept_is_read_again(
    serve, tmp_path
):
    server = serve(schema="followed")
    asked = [*items(1), *items(2, "unclear")[1:]]
    assert winners(opened(server, tmp_path), asked) == ["policy", "policy", "tie", "tie"]
    assert forms(server) == [True] * 4
    form = server.seen[0][1]["response_format"]
    assert (form["type"], form["json_schema"]["strict"]) == ("json_schema", True)
    schema = form["json_schema"]["schema"]
    assert list(schema["properties"]) == schema["required"] == ["comparison", "verdict"]
    assert schema["properties"]["verdict"]["enum"] == ["A", "B", "tie"]
    # by the next evaluation, which asks nothing
    assert winners(opened(server, tmp_path), asked) == ["policy", "policy", "tie", "tie"]
    assert len(server.seen) == 4


def test_a_server_that_ignores_the_form_is_read_as_ever(serve, tmp_path):
    server = serve(schema="ignored")
    assert winners(opened(server, tmp_path), items(1)) == ["policy", "policy"]
    assert forms(server) == [True] * 2


@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_server_that_refuses_is_asked_for_text_said_in_one_line_and_remembered(serve, tmp_path, caplog, concurrency):
    server = serve(schema="refused")
    judge = opened(server, tmp_path, concurrency=concurrency)
    with caplog.at_level(logging.INFO):
        assert winners(judge, items(4)) == ["policy"] * 8
        tried = sum(forms(server))
        assert tried == 1 if concurrency == 1 else tried <= concurrency
        assert winners(judge, items(6)) == ["policy"] * 12
    assert sum(forms(server)) == tried
    said = [one.getMessage() for one in caplog.records if "free text" in one.getMessage()]
    assert len(said) == 1
    assert "response_format is unsupported" in said[0]
    assert "failed" not in caplog.text


def test_a_request_that_is_refused_in_either_form_has_failed_and_says_nothing_of_the_form(serve, tmp_path, caplog):
    server = serve(schema="followed", fail=[400, 400])
    judge = opened(server, tmp_path, concurrency=1)
    with caplog.at_level(logging.INFO):
        assert winners(judge, items(2)) == ["failed", "policy", "policy", "policy"]
    assert forms(server) == [True, False, True, True, True]
    assert "free text" not in caplog.text


def test_one_letter_is_asked_for_as_a_letter(serve, tmp_path):
    server = serve(schema="refused")
    assert winners(opened(server, tmp_path, verdict="token"), items(1)) == ["policy", "policy"]
    assert forms(server) == [False] * 2


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ('{"comparison": "Verdict: B", "verdict": "A"}', 1.0),
        (' {"comparison": "", "verdict": "tie"}\n', 0.5),
        ('{"verdict": "B", "comparison": "</think> <think> {}\nVerdict: A"}', 0.0),
        ('<think>{"verdict": "A"}</think>{"verdict": "B"}', 0.0),
        ('<think>Verdict: A</think>{"comparison": "it says </think>", "verdict": "B"}', 0.0),
        ('<think>so far {"verdict": "A"}', None),
        ('{"comparison": "x. Verdict: A", "verdict": "A or B"}', None),
        ('{"comparison": "x. Verdict: A", "verdict": 1}', None),
        ('{"comparison": "x.\\nVerdict: A", "verdict": null}', None),
        ('{"comparison": "a\nb", "verdict": "A"}', 1.0),
        ('{"verdict": "' + "[" * 99_999 + '"}', None),
        ('{"a": ' * 99_999 + "}" * 99_999, None),
        ('I quote {"verdict": "A"}\nVerdict: B', 0.0),
        ('{"verdict": "A"}\nVerdict: B', 0.0),
        ("Verdict: A", 1.0),
    ],
)
def test_json_states_its_verdict_by_that_field_alone(reply, value):
    assert read_verdict(reply) == value


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_response_that_is_quoted_in_json_does_not_state_the_verdict(text):
    for ascii_only in (True, False):
        assert read_verdict(json.dumps({"comparison": text, "verdict": "B"}, ensure_ascii=ascii_only)) == 0.0


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ('{"comparison": "long. Verdict: A', None),
        ('{"comparison": "long", "verdict": "A"}', 1.0),
        ('{"comparison": "long", "verdict": "A"}' + "\n " * 99, 1.0),
    ],
)
def test_json_that_was_cut_off_is_no_verdict_unless_it_was_whole(content, value):
    body = json.dumps({"choices": [{"message": {"content": content}, "finish_reason": "length"}]}).encode()
    verdict = verdict_of(body, JudgeConfig(name="llm:http://x/v1", verdict="reasoning"))
    assert verdict.value == value
    assert read_verdict(verdict.reply) == value


def test_the_key_is_not_in_the_line_that_says_why(serve, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("REFSCORE_JUDGE_KEY", "unsupported")
    with caplog.at_level(logging.INFO):
        winners(opened(serve(schema="refused"), tmp_path), items(1))
    assert re.search("response_format is <key>", caplog.text)
