"""Models that think before they reply: told not to where the template can; a thought that was cut off is no verdict."""

import json
import logging
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

import pipeline.judges.local
from pipeline.config.judges import JudgeConfig
from pipeline.errors import ConfigError
from pipeline.judges.asking.completions import verdict_of
from pipeline.judges.asking.verdicts import read_verdict
from pipeline.judges.encoding import encode_turns, opens_thought, reply_text
from pipeline.judges.judging import Duel, Prompt, Response
from pipeline.judges.local import open_local
from pipeline.judges.memory import Verdicts
from tests.conftest import make_tiny_model, make_tiny_tokenizer

ALWAYS = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
SWITCHED = ALWAYS.replace("<think>\n", "<think>{% if enable_thinking is false %}</think>{% endif %}")


def tokenizer_with(template):
    tokenizer = make_tiny_tokenizer()
    # special, as some models have them
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_that_can_be_told_so_asks_for_no_thought():
    tokenizer = tokenizer_with(SWITCHED)
    turns = [{"role": "user", "content": "a"}]
    assert tokenizer.decode(encode_turns(tokenizer, turns, reply_next=True)) == "a<|assistant|><think></think>"
    assert not opens_thought(tokenizer)
    assert opens_thought(tokenizer_with(ALWAYS))
    assert not opens_thought(make_tiny_tokenizer())


def test_marks_of_thoughts_stay_in_a_reply_and_other_special_tokens_do_not():
    tokenizer = tokenizer_with(ALWAYS)
    said = "<think>Verdict: A</think>Verdict: B<|end|>"
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    assert reply_text(tokenizer, ids, inside_thought=False) == "<think>Verdict: A</think>Verdict: B"
    inside = reply_text(tokenizer, ids[1:], inside_thought=True)
    assert inside == "<think>Verdict: A</think>Verdict: B"


class Engine:
    """Says the same of everything, and counts what it is asked."""

    def __init__(self, tokenizer, said):
        self.ids = tokenizer(said, add_special_tokens=False)["input_ids"]
        self.asked = 0

    def generate(self, inputs, _params, use_tqdm):
        self.asked += len(inputs)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=self.ids, logprobs=None)]) for _ in inputs]


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """Verdict on one duel by a local judge whose template opens a thought, and how often the engine was asked for it."""
    directory = make_tiny_model(tmp_path / "tiny", max_position_embeddings=4096)
    tokenizer = tokenizer_with(ALWAYS)
    tokenizer.save_pretrained(directory)

    def verdict(said, **settings):
        engine = Engine(tokenizer, said)

        @contextmanager
        def sized_engine(*_, **__):
            yield engine

        monkeypatch.setattr(pipeline.judges.local, "sized_engine", sized_engine)
        judge = open_local(
            JudgeConfig(name=f"llm:{directory}", **{"verdict": "reasoning", **settings}),
            Verdicts(tmp_path / "verdicts.jsonl"),
        )
        duel = Duel(Prompt("0", "p"), Response("a", "stop"), Response("b", "stop"))
        return judge.prefer([duel])[0], engine.asked

    return verdict


def test_a_thought_that_the_prompt_opened_and_nothing_closed_is_no_verdict(judged, caplog):
    with caplog.at_level(logging.WARNING):
        assert judged("so far A leads.\nVerdict: A") == (None, 1)
    assert "1 replies end inside a thought: raise its max_tokens" in caplog.text
    # nor when it is read again from what was kept
    assert judged("so far A leads.\nVerdict: A") == (None, 0)


def test_what_follows_a_thought_that_the_prompt_opened_is_read(judged, caplog):
    assert judged("Verdict: A</think>Verdict: B<|end|>") == (0.0, 1)
    assert "thought" not in caplog.text


def test_one_letter_is_not_asked_for_inside_a_thought(judged):
    with pytest.raises(ConfigError, match="use verdict: reasoning"):
        judged("A", verdict="token")


def test_thoughts_before_they_were_told_apart_are_asked_for_again(judged, monkeypatch):
    monkeypatch.setattr(pipeline.judges.local, "knows_thoughts", lambda _: False)
    judged("Verdict: A")
    monkeypatch.undo()
    assert judged("Verdict: A</think>Verdict: B") == (0.0, 1)


@pytest.mark.parametrize(
    ("message", "finish_reason", "value"),
    [
        ({"content": "Verdict: A"}, "stop", 1.0),
        ({"content": "Verdict: A"}, None, 1.0),
        ({"content": "Verdict: A"}, "length", None),
        ({"content": "A leads</think>Verdict: B"}, "length", 0.0),
        ({"content": "Verdict: B", "reasoning_content": "Verdict: A"}, "length", 0.0),
        ({"content": "Verdict: B", "reasoning": "Verdict: A"}, "stop", 0.0),
        ({"content": None, "reasoning_content": "Verdict: A"}, "length", None),
        ({"content": "", "reasoning": "Verdict: A"}, "length", None),
        ({"content": "Verdict: A", "reasoning_content": None}, "stop", 1.0),
    ],
)
def test_a_server_s_reply_that_was_cut_off_while_it_may_have_been_thinking_is_no_verdict(message, finish_reason, value):
    body = json.dumps({"choices": [{"message": message, "finish_reason": finish_reason}]}).encode()
    verdict = verdict_of(body, JudgeConfig(name="llm:http://x/v1", verdict="reasoning"))
    assert verdict.value == value
    # read again as it was kept
    assert read_verdict(verdict.reply) == value


def test_one_letter_is_always_cut_off_and_read():
    body = json.dumps({"choices": [{"message": {"content": "A"}, "finish_reason": "length"}]}).encode()
    assert verdict_of(body, JudgeConfig(name="llm:http://x/v1")).value == 1.0
