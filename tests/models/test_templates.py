"""Every file that may be a model's chat template is part of what it says, and goes with its tokenizer."""

import pytest

from pipeline.models.identity import behaviour_digest
from pipeline.models.locate import copy_tokenizer
from tests.conftest import make_tiny_model

TEMPLATES = ("chat_template.jinja", "additional_chat_templates/tool_use.jinja")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_counts_and_is_copied(tmp_path, name):
    directory = make_tiny_model(tmp_path / "tiny")
    before = behaviour_digest(directory)
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("{{ messages }}")
    assert behaviour_digest(directory) != before
    (tmp_path / "copy").mkdir()
    copy_tokenizer(directory, tmp_path / "copy")
    assert (tmp_path / "copy" / name).read_text() == "{{ messages }}"
    assert (tmp_path / "copy/tokenizer.json").is_file()
