"""A reward is kept by the token ids that were read and by the model that read them, whatever the texts and files are called."""

import json

import pytest

import pipeline.judges.reward_model
from pipeline.config.judges import JudgeConfig
from pipeline.judges.judging import Duel, Prompt, Response
from pipeline.judges.memory import Verdicts
from pipeline.judges.reward_model import open_reward_model
from pipeline.models.load import chat_template_digest, vocabulary_digest
from tests.conftest import make_tiny_model, make_tiny_tokenizer


@pytest.fixture
def reward(tmp_path, monkeypatch):
    """A model directory, and a function: which sequences are read anew to compare two responses."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    directory = tmp_path / "reward"
    tiny = make_tiny_model(tmp_path / "tiny")
    LlamaForSequenceClassification(LlamaConfig.from_pretrained(tiny, num_labels=1)).save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)
    tokenizer = make_tiny_tokenizer()
    samples = (vocabulary_digest(tokenizer), chat_template_digest(tokenizer))

    def read(first, second, *, same=True):
        seen = []
        monkeypatch.setattr(
            pipeline.judges.reward_model,
            "_computed",
            lambda _directory, _settings, _dtype, ids: seen.extend(ids) or [float(len(one)) for one in ids],
        )
        settings = JudgeConfig(name=f"reward_model:{directory}")
        judge = open_reward_model(settings, Verdicts(tmp_path / "verdicts.jsonl"), samples if same else None)
        judge.prefer([Duel(Prompt("0", "p", ids=(7, 8)), first, second)])
        return seen

    return directory, read


def test_other_texts_of_the_same_tokens_have_the_same_reward(reward):
    _, read = reward
    assert read(Response("a", "stop", ids=(9,)), Response("b", "stop", ids=(10,))) == [[7, 8, 9], [7, 8, 10]]
    assert read(Response("a ", "stop", ids=(9,)), Response("c", "stop", ids=(11,))) == [[7, 8, 11]]


def test_the_same_texts_of_other_tokens_have_not(reward):
    _, read = reward
    a, b = (Response(text, "stop", ids=(at,)) for at, text in enumerate("ab"))
    read(a, b)
    # the prompt's own tokens and those of its text differ
    assert len(read(a, b, same=False)) == 2
    assert len(read(Response("a", "stop", ids=(12,)), b)) == 1


def test_a_template_that_changes_what_is_read_is_another_key_and_one_that_does_not_is_none(reward):
    directory, read = reward
    a, b = (Response(text, "stop") for text in "ab")
    assert len(read(a, b)) == 2
    path = directory / "chat_template.jinja"
    path.write_text(path.read_text() + "{# nothing #}")
    assert read(a, b) == []
    path.write_text(path.read_text() + "!")
    assert len(read(a, b)) == 2


@pytest.mark.parametrize("change", [{"rms_norm_eps": 0.5}, {"max_position_embeddings": 256}])
def test_another_configuration_is_another_model(reward, change):
    directory, read = reward
    a, b = (Response(text, "stop") for text in "ab")
    read(a, b)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert len(read(a, b)) == 2


def test_a_reward_is_kept_when_it_comes(reward, tmp_path, monkeypatch):
    """A kill while many are computed loses those that were not there yet."""
    directory, read = reward

    def computed(*_):
        yield 1.0
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.judges.reward_model, "_computed", computed)
    judge = open_reward_model(
        JudgeConfig(name=f"reward_model:{directory}"), Verdicts(tmp_path / "verdicts.jsonl"), None
    )
    a, b = (Response(text, "stop") for text in "ab")
    with pytest.raises(KeyboardInterrupt):
        judge.prefer([Duel(Prompt("0", "p"), a, b)])
    assert len(read(a, b, same=False)) == 1
