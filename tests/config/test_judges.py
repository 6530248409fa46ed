"""Judges by name: what can be said, what is refused, that every setting is read, that no secret is stored."""

import pytest

from pipeline.config.experiment import Config
from pipeline.config.files import dump_config, load_config
from pipeline.config.judges import JudgeConfig, seen_by, split_members
from pipeline.errors import ConfigError


def configured(tmp_path, judge):
    path = tmp_path / "c.yaml"
    path.write_text("data: {path: a.jsonl}\n")
    return load_config(path, [f"judge={judge}"])


def test_strings_and_mappings_both_name_judges_and_read_back_equal(tmp_path):
    config = configured(
        tmp_path,
        "[implicit, 'rule:max_words=80', {name: 'llm:https://judge.example/v1', model: m, label: big, verdict: reasoning}, "
        "'panel:[rule:max_words=9, rule:regex=[a,b]]']",
    )
    assert [judge.shown for judge in config.judge][:3] == ["implicit", "rule:max_words=80", "big"]
    assert config.judge[2].remote
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert "\n- implicit\n" in dump_config(config)
    assert configured(tmp_path, "implicit").judge[0].kind == "implicit"


@pytest.mark.parametrize(
    ("judge", "problem"),
    [
        ("rule:brief", "judge 'rule:brief' is unknown"),
        ("magic", "judge 'magic' is unknown; there are: implicit"),
        ("'implicit:x'", "is unknown"),
        ("'llm:'", "is unknown"),
        ("'panel:[rule:no_repetition]'", "two judges or more"),
        ("'panel:[rule:no_repetition, implicit]'", "'implicit' cannot sit in a panel"),
        ("'panel:[rule:no_repetition, rule:brief]'", "'rule:brief' is unknown"),
        ("{name: 'rule:no_repetition', model: x}", "does not read model"),
        ("{name: 'llm:some/model', retries: 3}", "does not read retries"),
        ("{name: 'llm:some/model', max_tokens: 30}", "does not read max_tokens"),
        ("{name: 'rule:no_repetition', vredict: x}", "vredict"),
        ("'annotations:gone.json'", "gone.json is no file"),
        ("['rule:no_repetition', 'rule:no_repetition']", "is listed twice"),
        ("{name: implicit, label: pairs}", "judge 'implicit' takes no label"),
        ("{name: 'rule:no_repetition', label: implicit}", "that name is the judge of held-out pairs"),
    ],
)
def test_nonsense_is_refused(tmp_path, judge, problem):
    with pytest.raises(ConfigError) as error:
        configured(tmp_path, judge)
    assert problem in str(error.value)


@pytest.mark.parametrize("address", ["https://user:pw@judge.example/v1", "https://judge.example/v1?api_key=abc"])
def test_a_secret_in_an_address_is_refused_because_addresses_are_saved(tmp_path, address):
    with pytest.raises(ConfigError, match="holds a secret"):
        configured(tmp_path, f"'llm:{address}'")


def test_members_are_split_at_the_outer_commas():
    assert split_members("[rule:regex=[a,b], llm:x]") == ["rule:regex=[a,b]", "llm:x"]
    assert split_members("rule:a, rule:b") == []


def test_every_setting_is_described():
    """That each is read is shown by behaviour: tests/stages/test_every_judge_option.py."""
    assert all(field.description for field in JudgeConfig.model_fields.values())


@pytest.mark.parametrize(("name", "problem"), [("implicit", "judges no texts"), ("rule:brief", "is unknown")])
def test_the_judge_that_makes_pairs_judges_texts(name, problem):
    with pytest.raises(ValueError, match=problem):
        Config.model_validate({"data": {"path": "a"}, "generate": {"pair_judge": name}})


def test_the_judge_that_makes_pairs_need_not_judge_the_evaluation():
    config = {"data": {"path": "a"}, "judge": "implicit", "generate": {"pair_judge": "rule:no_repetition"}}
    assert Config.model_validate(config).generate.pair_judge == "rule:no_repetition"


@pytest.mark.parametrize("name", ["policy", "tie", "a b", "-x"])
def test_a_model_cannot_be_called_what_a_table_says_otherwise(name):
    with pytest.raises(ValueError, match="cannot name a model"):
        Config.model_validate({"data": {"path": "a"}, "generate": {"models": {name: "x"}}})


def shared(one, other):
    return sorted(seen_by(JudgeConfig(name=one)) & seen_by(JudgeConfig(name=other)))


def test_what_two_judges_share_is_declared_and_not_guessed_from_their_names():
    assert shared("rule:no_repetition", "rule:complete_and_concise") == ["repeated words"]
    assert shared("rule:max_words=50", "rule:complete_and_concise") == ["length"]
    assert shared("rule:sentiment=textblob:odd", "rule:sentiment=vader:even") == []
    assert shared("rule:sentiment=textblob", "rule:sentiment=vader:even") == ["the even half of words of sentiment"]
    assert shared("rule:sentiment=vader:odd", "rule:sentiment=vader:even") == ["the lexicon of vader"]
    assert shared("llm:/models/judge", "panel:[llm:/models/judge, rule:no_repetition]") == ["the model /models/judge"]
    # a text of the user's may hold any word
    for unknown in ("implicit", "rule:contains=dog", "panel:[rule:contains=dog, rule:no_repetition]"):
        assert seen_by(JudgeConfig(name=unknown)) is None
