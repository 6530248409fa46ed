"""A local judge that was edited is asked again: its template, its configuration and its threshold are in a verdict's key."""

import json

import pytest

from pipeline.config.judges import JudgeConfig
from pipeline.judges.judging import Duel, Prompt, Response
from pipeline.judges.local import open_local
from tests.conftest import make_tiny_model


class Keys:
    """Verdicts that are never had; remembers the keys that were looked for."""

    def values(self, keys, items, ask, read):
        self.keys = keys
        return [None] * len(keys)


def keys(directory, **settings):
    looked_for = Keys()
    judge = open_local(JudgeConfig(name=f"llm:{directory}", **settings), looked_for)
    judge.prefer([Duel(Prompt("0", "p"), Response("a", "stop"), Response("b", "stop"))])
    return looked_for.keys


def edit_template(directory):
    path = directory / "chat_template.jinja"
    path.write_text(path.read_text() + " ")


def edit_configuration(directory):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 0.5}))


def add_template(directory):
    path = directory / "additional_chat_templates/tool_use.jinja"
    path.parent.mkdir()
    path.write_text("{{ messages }}")


@pytest.mark.parametrize("edit", [edit_template, edit_configuration, add_template])
def test_an_edited_judge_is_asked_again(tmp_path, edit):
    directory = make_tiny_model(tmp_path / "tiny")
    before = keys(directory)
    assert keys(directory) == before
    edit(directory)
    assert keys(directory) != before


def test_another_threshold_is_another_key(tmp_path):
    directory = make_tiny_model(tmp_path / "tiny")
    assert keys(directory) != keys(directory, min_mass=0.6)
