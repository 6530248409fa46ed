"""Every known format becomes the same record; every odd row has a reason; broken files say where."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.experiment import DataConfig
from pipeline.errors import ConfigError, DataError
from pipeline.pairs.preferences import Dropped, Preference, open_source
from tests.conftest import write_rows

USER = {"role": "user", "content": "Hi?"}
SYSTEM = {"role": "system", "content": "Be brief."}
GOOD = {"role": "assistant", "content": "Hello."}
BAD = {"role": "assistant", "content": "Go away."}
EARLIER = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]

FORMS = {
    "TRL explicit, strings": ({"prompt": "Hi?", "chosen": "Hello.", "rejected": "Go away."}, [USER]),
    "TRL explicit, messages": ({"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]}, [SYSTEM, USER]),
    "TRL implicit, messages": ({"chosen": [*EARLIER, USER, GOOD], "rejected": [*EARLIER, USER, BAD]}, [*EARLIER, USER]),
    "UltraFeedback-binarized": (
        {"prompt": "Hi?", "prompt_id": "x", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 1.0},
        [USER],
    ),
    "HH-RLHF dialogue strings": (
        {
            "chosen": "\n\nHuman: A\n\nAssistant: B\n\nHuman: Hi?\n\nAssistant: Hello.",
            "rejected": "\n\nHuman: A\n\nAssistant: B\n\nHuman: Hi?\n\nAssistant: Go away.",
        },
        [*EARLIER, USER],
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi?"}],
            "chosen": {"from": "gpt", "value": "Hello."},
            "rejected": {"from": "gpt", "value": "Go away."},
        },
        [SYSTEM, USER],
    ),
}


def read(path, **data):
    source = open_source(str(path), DataConfig(path=str(path), **data))
    return source, list(source.preferences())


@pytest.mark.parametrize("name", FORMS)
def test_a_format_is_recognised_and_keeps_roles_and_turns(tmp_path, name):
    row, prompt = FORMS[name]
    source, (found,) = read(write_rows(tmp_path / "d.jsonl", [row]))
    assert source.format == name
    assert isinstance(found, Preference)
    assert (found.prompt, found.chosen, found.rejected) == (prompt, "Hello.", "Go away.")


def test_implicit_strings_are_cut_at_white_space_before_they_part(tmp_path):
    row = {"chosen": "Say hello. greetings friend", "rejected": "Say hello. green leaves"}
    source, (found,) = read(write_rows(tmp_path / "d.jsonl", [row]))
    assert source.format == "TRL implicit, strings"
    assert found.prompt[0]["content"] == "Say hello. "
    assert (found.chosen, found.rejected) == ("greetings friend", "green leaves")


def test_a_column_map_reads_the_rest_with_a_system_prompt(tmp_path):
    row = {"question": "Hi?", "good": "Hello.", "bad": "Go away.", "sys": "Be brief."}
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad", "system": "sys"}
    _, (found,) = read(write_rows(tmp_path / "d.jsonl", [row]), columns=columns)
    assert found.prompt == [SYSTEM, USER]
    with pytest.raises(DataError, match=r"question.*data\.columns"):
        read(tmp_path / "d.jsonl")
    with pytest.raises(ConfigError, match="query"):
        read(tmp_path / "d.jsonl", columns={"prompt": "query"})


ODD = {
    "missing_field": {"prompt": "Hi?", "chosen": None, "rejected": "x"},
    "wrong_type": {"prompt": "Hi?", "chosen": 3, "rejected": "x"},
    "empty_response": {"prompt": "Hi?", "chosen": " ", "rejected": "x"},
    "empty_prompt": {"prompt": " ", "chosen": "y", "rejected": "x"},
    "half_a_character": {"prompt": "p", "chosen": "y", "rejected": "x \ud83d"},
    "identical_responses": {"prompt": "Hi?", "chosen": "x", "rejected": "x"},
    "unknown_role": {"prompt": "Hi?", "chosen": [{"role": "wizard", "content": "x"}], "rejected": "x"},
    "response_of_many_messages": {"prompt": "Hi?", "chosen": [GOOD, USER, GOOD], "rejected": "x"},
    "last_turn_not_assistant": {"prompt": "Hi?", "chosen": [USER], "rejected": "x"},
}


@pytest.mark.parametrize("reason", ODD)
def test_an_odd_row_is_dropped_with_its_reason_and_number(tmp_path, reason):
    good = FORMS["TRL explicit, strings"][0]
    _, found = read(write_rows(tmp_path / "d.jsonl", [good, ODD[reason], good]))
    assert [type(item) for item in found] == [Preference, Dropped, Preference]
    assert (found[1].reason, found[1].row) == (reason, 1)


def test_dialogues_that_part_before_the_last_turn_are_dropped(tmp_path):
    row = {
        "chosen": "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: D",
        "rejected": "\n\nHuman: A\n\nAssistant: X\n\nHuman: C\n\nAssistant: Y",
    }
    _, found = read(write_rows(tmp_path / "d.jsonl", [row]))
    assert found[0].reason == "diverges_before_last_turn"


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": oops}\n', "line 2, column 12"),
        (b'{"prompt": "a\xff"}\n', "line 1, byte 14"),
        (b"[1, 2]\n", "line 1: a row must be a JSON object, got list"),
        (b"\n\n", "holds no rows"),
        (b'{"a": 1}\n', "columns a fit no known format"),
    ],
)
def test_a_broken_file_says_where(tmp_path, content, where):
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=where):
        read(path)


def test_json_and_parquet_hold_the_same_rows(tmp_path):
    rows = [FORMS["TRL explicit, strings"][0] | {"topic": "greeting"}] * 2
    (tmp_path / "d.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    for name in ("d.json", "d.parquet"):
        _, found = read(tmp_path / name)
        assert [(item.chosen, item.topic, item.row) for item in found] == [
            ("Hello.", "greeting", 0),
            ("Hello.", "greeting", 1),
        ]


def test_a_parquet_file_is_read_to_its_last_row_group(tmp_path):
    rows = [{"prompt": f"{number}?", "chosen": "yes", "rejected": "no"} for number in range(25)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet", row_group_size=4)
    _, found = read(tmp_path / "d.parquet")
    assert [item.prompt[0]["content"] for item in found] == [row["prompt"] for row in rows]


def test_a_torn_parquet_file_is_a_message(tmp_path):
    path = tmp_path / "d.parquet"
    pq.write_table(pa.Table.from_pylist([FORMS["TRL explicit, strings"][0]]), path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read(path)


def test_a_folder_is_read_as_a_hub_data_set_is(tmp_path):
    write_rows(tmp_path / "set" / "train.jsonl", [FORMS["TRL implicit, messages"][0]])
    write_rows(tmp_path / "set" / "test.jsonl", [FORMS["TRL implicit, messages"][0]] * 3)
    assert len(read(tmp_path / "set", split="test")[1]) == 3
    with pytest.raises(DataError, match="nosuch"):
        read(tmp_path / "set", split="nosuch")


def test_max_rows_limits_every_source(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", [FORMS["TRL explicit, strings"][0]] * 5)
    assert len(read(path, max_rows=2)[1]) == 2


def test_a_hub_data_set_without_a_network_says_what_to_do():
    with pytest.raises(DataError, match="Without a network"):
        read("nobody/nothing")


def test_a_path_that_leads_nowhere_is_a_message():
    with pytest.raises(DataError, match="no such file"):
        read("nowhere/at/all.jsonl")


def test_real_data_sets_are_recognised(shared_data):
    source, found = read(shared_data / "hh_harmless_400.jsonl")
    assert source.format == "HH-RLHF dialogue strings"
    assert [item.reason for item in found if isinstance(item, Dropped)] == ["empty_response"]
    source, found = read(shared_data / "sharegpt_dpo_en_150.jsonl")
    assert source.format == "sharegpt"
    assert len([item for item in found if isinstance(item, Preference)]) == 150
