"""No silent no-op: changing any setting of a judge changes a verdict, what it costs, what is sent, or an error.

Verdicts are kept between a run and the run after a change, as they are between evaluations: what was said under other
settings must not be taken for an answer.
"""

import math
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

import pipeline.judges.local
import pipeline.judges.reward_model
from pipeline.config.judges import JudgeConfig
from pipeline.errors import RefscoreError
from pipeline.judges.judging import Comparison, Prompt, Response, judge_both_orders
from pipeline.judges.open import JudgeContext, open_judge
from pipeline.models.load import load_tokenizer
from tests.conftest import make_tiny_model, make_tiny_tokenizer
from tests.judges.letter_server import Server

ANY, LOCAL, REMOTE, REWARD = "rule:contains=e", "llm:<model>", "llm:<url>", "reward_model:<model>"
RUBRIC = "<rubric>"
REASONED = {"verdict": "reasoning"}
# (field, judge): the change, what must be set beside it (in both runs) to give it a meaning, and how the server behaves
CHANGES = {
    ("name", ANY): ("rule:contains=z", {}, {}),
    ("label", ANY): ("another", {}, {}),
    ("verdict", LOCAL): ("reasoning", {}, {}),
    ("verdict", REMOTE): ("reasoning", {}, {}),
    ("rubric", LOCAL): (RUBRIC, {}, {}),
    ("rubric", REMOTE): (RUBRIC, {}, {}),
    ("max_tokens", LOCAL): (16, REASONED, {}),
    ("max_tokens", REMOTE): (16, REASONED, {}),
    ("min_mass", LOCAL): (0.6, {}, {}),
    ("min_mass", REMOTE): (0.6, {}, {"mass": 0.5}),
    ("dtype", LOCAL): ("bfloat16", {}, {}),
    ("dtype", REWARD): ("bfloat16", {}, {}),
    ("engine", REWARD): ("transformers", {}, {}),
    ("model", REMOTE): ("b", {"model": "a"}, {"models": ("a", "b")}),
    ("key_env", REMOTE): ("OTHER_KEY", {}, {}),
    ("concurrency", REMOTE): (1, {}, {"delay": 0.1}),
    ("requests_per_minute", REMOTE): (120, {}, {}),
    ("retries", REMOTE): (0, {"concurrency": 1}, {"fail": [503]}),
    ("timeout", REMOTE): (0.1, {"retries": 0}, {"delay": 0.4}),
    ("price_in", REMOTE): (3.0, {}, {}),
    ("price_out", REMOTE): (3.0, {}, {}),
    ("max_cost", REMOTE): (1e-6, {"price_in": 3.0}, {}),
}


def test_every_field_is_walked():
    assert {field for field, _ in CHANGES} == set(JudgeConfig.model_fields)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    where = tmp_path_factory.mktemp("judges")
    tiny = make_tiny_model(where / "tiny", max_position_embeddings=4096)
    LlamaForSequenceClassification(LlamaConfig.from_pretrained(tiny, num_labels=1)).save_pretrained(where / "reward")
    make_tiny_tokenizer().save_pretrained(where / "reward")
    rubric = where / "rubric.txt"
    rubric.write_text("Which is politer?\n{prompt}\n{response_a}\n{response_b}\n")
    return {RUBRIC: str(rubric), LOCAL: f"llm:{tiny}", REWARD: f"reward_model:{where / 'reward'}"}


@pytest.mark.parametrize(("field", "kind"), CHANGES, ids=lambda part: part.split(":<")[0])
def test_changing_it_changes_something(models, tmp_path, monkeypatch, field, kind):
    value, beside, behaviour = CHANGES[field, kind]
    monkeypatch.setenv("REFSCORE_JUDGE_KEY", "one")
    monkeypatch.setenv("OTHER_KEY", "other")
    server = Server(**behaviour)
    try:
        settings = {"name": models.get(kind, f"llm:{server.url}" if kind == REMOTE else kind), **beside}
        found = []
        for changes in ({}, {}, {field: value}):
            # what was said before is still there, but for what only the server sees
            place = tmp_path / (f"{len(found)}" if seen_by_the_server_only(field) else "verdicts")
            server.fail = list(behaviour.get("fail", ()))
            given = {name: models.get(value, value) for name, value in changes.items()}
            found.append(outcome({**settings, **given}, server, place, monkeypatch, field))
    finally:
        server.shutdown()
        server.server_close()
    before, again, changed = found
    judgements = 0
    assert before[judgements] == again[judgements]
    # neither what was said under the settings of before, nor what is said for the first time whatever the settings
    assert changed not in (before, again)


def seen_by_the_server_only(field):
    return field in {"key_env", "concurrency", "requests_per_minute", "retries", "timeout", "engine", "max_cost"}


def outcome(settings, server, place, monkeypatch, field):
    """Judgements, cost, what an engine or a server was told; for fields that are about it, how many at once and how fast."""
    told = []
    items = [
        Comparison(Prompt(str(n), f"prompt {n}"), 0, "policy", "reference", Response("a good one", "stop"), Response("bad", "stop"))
        for n in range(3)
    ]  # fmt: skip
    server.seen.clear()
    server.most, begun = 0, time.monotonic()
    with monkeypatch.context() as patch:
        doubles(patch, told)
        try:
            judge = open_judge(JudgeConfig(**settings), JudgeContext(place))
            judgements, cost = judge_both_orders(judge, items), judge.cost()
        except RefscoreError as error:
            judgements, cost = str(error), None
    sent = sorted(
        (key, request["model"], request["max_tokens"], request["messages"][0]["content"])
        for key, request in server.seen
    )
    pace = {"concurrency": server.most > 1, "requests_per_minute": time.monotonic() - begun > 2.2}.get(field)
    return judgements, cost, told, sent, pace


def doubles(patch, told):
    @contextmanager
    def sized_engine(directory, config, dtype, length, **options):
        told.append(dtype)
        tokenizer = load_tokenizer(directory, SimpleNamespace(trust_remote_code=False))
        yield Letters(tokenizer, told)

    patch.setattr(pipeline.judges.local, "sized_engine", sized_engine)
    for name in ("with_vllm", "with_transformers"):
        patch.setattr(
            pipeline.judges.reward_model,
            name,
            lambda directory, dtype, ids, name=name: told.append((name, dtype)) or [float(len(one)) for one in ids],
        )


class Letters:
    """An engine that says A with 0.3 and B with 0.1, or reasons for 20 tokens and then says A."""

    def __init__(self, tokenizer, told):
        self.tokenizer, self.told = tokenizer, told

    def generate(self, inputs, params, use_tqdm):
        self.told += [self.tokenizer.decode(one["prompt_token_ids"]) for one in inputs]
        reasoned = self.tokenizer("x" * 20 + "\nVerdict: A", add_special_tokens=False)["input_ids"]
        said = {token: self.tokenizer.decode([token]).strip().lower() for token in params.logprob_token_ids or []}
        chances = {
            token: SimpleNamespace(logprob=math.log({"a": 0.3, "b": 0.1}[letter] / list(said.values()).count(letter)))
            for token, letter in said.items()
        }
        reply = SimpleNamespace(token_ids=reasoned[: params.max_tokens], logprobs=[chances])
        return [SimpleNamespace(outputs=[reply]) for _ in inputs]
