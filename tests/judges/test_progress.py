"""Who listens hears how far a judge that is asked has come: every duel once, failures included, and none that was known."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

import pipeline.judges.local
from pipeline.config.judges import JudgeConfig
from pipeline.judges.judging import Comparison, Prompt, Response, judge_both_orders
from pipeline.judges.open import JudgeContext, open_judge
from tests.conftest import make_tiny_model, make_tiny_tokenizer
from tests.judges.letter_server import Server


class Heard:
    """A listener, and the ticker of its tasks, that remembers."""

    def __init__(self):
        self.tasks, self.done, self.texts, self.tokens = [], 0, [], 0

    def say(self, text):
        pass

    @contextmanager
    def progress(self, title, total):
        self.tasks.append((title, total))
        yield self

    def advance(self, units, text):
        self.done += units
        self.texts.append(text)

    def advance_tokens(self, units, tokens):
        self.done += units
        self.tokens += tokens


def items(number):
    return [
        Comparison(Prompt(str(n), f"p{n}"), 0, "policy", "reference", Response("longer", "stop"), Response("b", "stop"))
        for n in range(number)
    ]


@pytest.fixture
def server():
    one = Server()
    yield one
    one.shutdown()
    one.server_close()


def test_a_judge_behind_a_url_ticks_for_every_duel_that_is_asked_about(server, tmp_path):
    settings = JudgeConfig(name=f"llm:{server.url}", label="big", model="m", retries=0, concurrency=1)
    server.fail = [400]
    for number, asked in ((3, 6), (5, 5)):  # 4 new duels and the one that failed
        heard = Heard()
        judge_both_orders(open_judge(settings, JudgeContext(tmp_path, listener=heard)), items(number))
        assert heard.tasks == [("big judges", asked)]
        assert heard.done == asked
        assert heard.texts[-1] == ("1 failed" if number == 3 else "0 failed")
    heard = Heard()
    judge_both_orders(open_judge(settings, JudgeContext(tmp_path, listener=heard)), items(5))
    assert heard.tasks == []


def test_a_local_judge_ticks_for_every_duel_with_what_it_read_and_wrote(tmp_path, monkeypatch):
    directory = make_tiny_model(tmp_path / "tiny", max_position_embeddings=4096)
    ids = make_tiny_tokenizer()("Verdict: A", add_special_tokens=False)["input_ids"]

    class Engine:
        read = 0

        def generate(self, inputs, _params, use_tqdm):
            Engine.read += sum(len(one["prompt_token_ids"]) for one in inputs)
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, logprobs=None)]) for _ in inputs]

    @contextmanager
    def sized_engine(*_, **__):
        yield Engine()

    monkeypatch.setattr(pipeline.judges.local, "sized_engine", sized_engine)
    monkeypatch.setattr(pipeline.judges.local, "_WAVE", 4)
    heard = Heard()
    settings = JudgeConfig(name=f"llm:{directory}", label="near", verdict="reasoning")
    judge_both_orders(open_judge(settings, JudgeContext(tmp_path / "verdicts", listener=heard)), items(3))
    assert heard.tasks == [("near judges", 6)]
    assert heard.done == 6
    assert heard.tokens == Engine.read + 6 * len(ids)
