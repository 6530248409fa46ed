"""Data of prompts alone, and of other kinds for the sake of its prompts: what is read, told apart, dropped and split."""

from pathlib import Path

import polars as pl
import pytest

from pipeline.config.experiment import DataConfig
from pipeline.errors import ConfigError, DataError
from pipeline.pairs.groups import ResponseStream
from pipeline.pairs.preferences import Dropped, open_source
from pipeline.pairs.sources import read_for
from pipeline.pairs.splits import PairStream
from tests.conftest import make_tiny_tokenizer, preference_rows
from tests.pairs.inputs import ANSWER, TOOL, TOOL_TEMPLATE, USER, lines, parquet

SYSTEM = {"role": "system", "content": "S"}
OTHER = {"role": "user", "content": "And?"}
# every row asks: Hi?
FORMS = {
    "TRL, strings": {"prompt": "Hi?"},
    "TRL, messages": {"prompt": [USER]},
    "messages": {"messages": [USER]},
    "messages with an answer": {"messages": [USER, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi?"}]},
    "sharegpt with an answer": {
        "conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]
    },
    "Alpaca": {"instruction": "Hi?", "input": ""},
    "Alpaca with an answer": {"instruction": "Hi?", "input": "", "output": "Hello."},
    "an HH prompt": {"prompt": "\n\nHuman: Hi?\n\nAssistant:"},
    "beside a solution": {"prompt": "Hi?", "solution": "Hello.", "difficulty": 3},
    "beside a completion": {"prompt": [USER], "completion": [ANSWER]},
    "labelled": {"prompt": "Hi?", "completion": "Hello.", "label": True},
    "without its label": {"prompt": "Hi?", "completion": "Hello.", "label": None},
    "a pair": {"prompt": "Hi?", "chosen": "Hello.", "rejected": "Go."},
    "a pair of equals": {"prompt": "Hi?", "chosen": "Hello.", "rejected": "Hello."},
    "a list": {"prompt": "Hi?", "responses": ["Hello.", "Go."], "scores": [1, 2]},
}
NONE = {
    "a text": {"text": "Hi?"},
    "a question under another name": {"question": "Hi?"},
    "half a pair": {"prompt": "Hi?", "chosen": "Hello."},
}


def read(*rows, name="d.jsonl", content=None, wanted="prompts", **data):
    Path(name).write_bytes(lines(*rows) if content is None else content)
    source = open_source(name, DataConfig(path=name, **data), wanted)
    return source, list(source.preferences())


def stream(*rows, tokenizer=None, positions=None, **data):
    Path("d.jsonl").write_bytes(lines(*rows))
    data = DataConfig(path="d.jsonl", **{"eval_fraction": 0, **data})
    found = ResponseStream(data, tokenizer or make_tiny_tokenizer(), positions, wanted="prompts")
    return found, list(found)


@pytest.mark.parametrize("name", FORMS)
def test_a_form_says_what_is_asked(name):
    for _, (found,) in (read(FORMS[name]), read(name="d.parquet", content=parquet([FORMS[name]]))):
        assert not isinstance(found, Dropped), found
        assert (found.prompt, found.chosen, found.rejected, found.alone) == ([USER], "", "", True)


def test_other_names_are_given_as_elsewhere():
    _, (found,) = read({"question": "Hi?", "answer": "Hello."}, columns={"prompt": "question"})
    assert found.prompt == [USER]


@pytest.mark.parametrize("name", NONE)
def test_what_holds_no_prompt_is_refused(name):
    with pytest.raises(DataError, match=r"d\.jsonl: columns"):
        read(NONE[name])


def test_earlier_turns_and_the_system_are_part_of_the_prompt():
    _, (found,) = read({"messages": [USER, ANSWER, OTHER, ANSWER], "system": "S"})
    assert found.prompt == [SYSTEM, USER, ANSWER, OTHER]


def test_columns_beside_a_prompt_are_named_as_read_by_nothing():
    source, _ = read(FORMS["beside a solution"])
    assert (source.format, source.unread) == ("prompts, TRL explicit, strings", ["solution", "difficulty"])


@pytest.mark.parametrize("wanted", ["pairs", "responses", "lists"])
def test_a_loss_that_needs_more_says_what_does_not(wanted):
    with pytest.raises(
        DataError, match=r"d\.jsonl: the file holds prompts and no responses.*objective=policy_gradient"
    ):
        read({"prompt": "Hi?"}, wanted=wanted)
    # what looks like other data is still called that first, of a name that is misspelt too
    for row, said in (
        (FORMS["beside a completion"], "as supervised fine-tuning learns from"),
        ({"prompt": "Hi?", "good": "Hello.", "bad": "Go."}, "data.columns=.*chosen: good"),
    ):
        for asked_for in (wanted, None):
            with pytest.raises(DataError, match=f"{said}.*take its prompts alone.*objective=policy_gradient"):
                read(row, wanted=asked_for)
    assert read({"prompt": "Hi?"}, wanted=None)[1][0].alone


def test_labelled_responses_name_it_too():
    with pytest.raises(DataError, match=r"kto or bco learn from it, and train\.objective=policy_gradient"):
        read(FORMS["labelled"], wanted="pairs")


def test_prompts_come_as_pairs_where_all_data_makes_pairs():
    for name, row in {
        "pairs": FORMS["a pair"],
        "lists": FORMS["a list"],
        "alone": FORMS["messages"],
        "kto": FORMS["labelled"],
    }.items():
        Path(f"{name}.jsonl").write_bytes(lines(row))
    for names, held_out, kind in (
        (["pairs", "lists"], None, "pairs"),
        (["pairs", "alone"], None, "prompts"),
        (["kto"], None, "prompts"),
        (["pairs"], "alone", "prompts"),
        (["pairs"], "lists", "pairs"),
    ):
        data = DataConfig(path=[f"{name}.jsonl" for name in names], eval_path=held_out and f"{held_out}.jsonl")
        assert read_for(data, "prompts") == kind
    assert read_for(DataConfig(path="kto.jsonl"), "responses") == "responses"


def test_a_prompt_is_read_once_and_every_row_is_accounted_for():
    found, items = stream(
        {"prompt": "Hi?"}, {"prompt": "Who?"}, {"prompt": "Hi?"}, {"prompt": "  "}, {"prompt": None}, {"prompt": 7}
    )
    kept = [item for item in items if not isinstance(item, Dropped)]
    dropped = {item.row: item.reason for item in items if isinstance(item, Dropped)}
    assert [item.preference.row for item in kept] == [0, 1]
    assert {item.kind for item in kept} == {"prompt"}
    assert dropped == {2: "duplicate", 3: "empty_prompt", 4: "missing_field", 5: "wrong_type"}
    assert found.given == sum(found.read.values()) == 6


def test_the_split_is_that_of_pairs_of_the_same_prompts():
    rows, tokenizer = preference_rows(40), make_tiny_tokenizer()
    _, items = stream(*({"prompt": row["prompt"]} for row in rows), tokenizer=tokenizer, eval_fraction=0.3)
    Path("p.jsonl").write_bytes(lines(*rows))
    pairs = list(PairStream(DataConfig(path="p.jsonl", eval_fraction=0.3), tokenizer))
    assert {tuple(item.prompt_ids): item.split for item in items} == {
        tuple(pair.prompt_ids): pair.split for pair in pairs
    }
    assert {item.split for item in items} == {"train", "eval"}


def test_held_out_prompts_of_another_file_are_trained_on_by_none():
    Path("e.jsonl").write_bytes(lines({"prompt": "Hi?"}))
    _, items = stream({"prompt": "Hi?"}, {"prompt": "Who?"}, eval_path="e.jsonl")
    assert [getattr(item, "split", None) or item.reason for item in items] == ["eval", "prompt_is_held_out", "train"]


def test_a_prompt_without_room_for_a_token_is_dropped_whatever_becomes_of_long_responses():
    _, (whole,) = stream({"prompt": "Hi?"})
    length = len(whole.prompt_ids)
    for too_long in ("drop", "truncate_response"):
        _, (kept,) = stream({"prompt": "Hi?"}, max_length=length + 1, too_long=too_long)
        assert kept.prompt_ids == whole.prompt_ids
        _, (left_out,) = stream({"prompt": "Hi?"}, max_length=length, too_long=too_long)
        assert (left_out.reason, left_out.detail) == (
            "prompt_too_long",
            f"{length} tokens, data.max_length is {length}",
        )
    _, (left_out,) = stream({"prompt": "Hi?"}, positions=length)
    assert left_out.detail == f"{length} tokens, the model reads {length}"


def test_tools_stay_in_the_prompt():
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    _, (plain,) = stream({"prompt": "Hi?"}, tokenizer=tokenizer)
    _, (found,) = stream({"prompt": "Hi?", "tools": [TOOL]}, tokenizer=tokenizer)
    assert len(found.prompt_ids) > len(plain.prompt_ids)
    assert found.preference.tools == [TOOL]


def test_a_setting_for_lists_is_not_set_in_vain():
    with pytest.raises(ConfigError, match="learns from prompts alone: remove it"):
        stream(FORMS["a list"], lists="all_pairs")


def test_a_prompt_of_csv():
    _, (found,) = read(name="d.csv", content=pl.DataFrame({"prompt": ["Hi?"]}).write_csv().encode())
    assert found.prompt == [USER]
