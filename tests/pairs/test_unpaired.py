"""Unpaired data: every form of it says the same, labels are what people write, and what is no label is told."""

from itertools import pairwise
from pathlib import Path

import pytest

from pipeline.config.experiment import DataConfig
from pipeline.errors import ConfigError, DataError
from pipeline.pairs.groups import ResponseStream
from pipeline.pairs.preferences import Dropped, open_source
from tests.conftest import ROOT, make_tiny_tokenizer, preference_rows
from tests.pairs.inputs import ANSWER, CALL, TOOL, TOOL_TEMPLATE, USER, lines, parquet

SYSTEM = {"role": "system", "content": "S"}
SHAREGPT = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]
# every row says: Hi? - Hello., which is good
FORMS = {
    "TRL, strings": {"prompt": "Hi?", "completion": "Hello.", "label": True},
    "TRL, messages": {"prompt": [USER], "completion": [ANSWER], "label": True},
    "a log of thumbs": {"prompt": "Hi?", "response": "Hello.", "thumb": "up"},
    "a log of thumbs up": {"prompt": "Hi?", "response": "Hello.", "thumbs_up": True},
    "a log of votes": {"prompt": "Hi?", "response": "Hello.", "rating": 1},
    "Alpaca of LLaMA-Factory": {"instruction": "Hi?", "input": "", "output": "Hello.", "kto_tag": True},
    "messages of LLaMA-Factory": {"messages": [USER, ANSWER], "label": True},
    "sharegpt of LLaMA-Factory": {"conversations": SHAREGPT, "kto_tag": True},
    "messages beside a response": {"messages": [USER], "response": "Hello.", "label": True},
    "an HH prompt": {"prompt": "\n\nHuman: Hi?\n\nAssistant:", "completion": " Hello.", "label": True},
    "an HH dialogue": {"text": "\n\nHuman: Hi?\n\nAssistant: Hello.", "label": True},
}
LABELS = {
    "true": [True, 1, 1.0, "true", "True", "1", "up", "Thumbs up", "👍", "good"],
    "false": [False, 0, -1, "false", "0", "-1", "down", "thumbs_down", "👎", "bad"],
}


def read(*rows, name="d.jsonl", content=None, wanted="responses", **data):
    Path(name).write_bytes(lines(*rows) if content is None else content)
    source = open_source(name, DataConfig(path=name, **data), wanted)
    return source, list(source.preferences())


def stream(*rows, tokenizer=None, positions=None, mismatched=False, wanted="responses", **data):
    Path("d.jsonl").write_bytes(lines(*rows))
    data = DataConfig(path="d.jsonl", **{"eval_fraction": 0, **data})
    found = ResponseStream(data, tokenizer or make_tiny_tokenizer(), positions, wanted=wanted, mismatched=mismatched)
    return found, list(found)


@pytest.mark.parametrize("name", FORMS)
def test_a_form_says_prompt_response_and_label(name):
    for source, (found,) in (read(FORMS[name]), read(name="d.parquet", content=parquet([FORMS[name]]))):
        assert not isinstance(found, Dropped), found
        assert source.format.startswith("unpaired, ")
        assert not source.unread
        assert (found.prompt, found.chosen, found.rejected, found.label) == ([USER], "Hello.", "", True)


@pytest.mark.parametrize("good", LABELS)
def test_labels_as_people_write_them(good):
    rows = [{"prompt": f"{n}?", "response": "Hello.", "label": value} for n, value in enumerate(LABELS[good])]
    _, found = read(*rows)
    assert [one.label for one in found] == [good == "true"] * len(rows)


def test_labels_of_csv_are_read():
    text = b"prompt,response,label\nHi?,Hello.,True\nHi?,No.,0\nWho?,I am.,\n"
    _, found = read(name="d.csv", content=text)
    assert [getattr(one, "label", None) for one in found] == [True, False, None]
    assert (found[2].reason, found[2].detail) == ("no_label", "label is empty")


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"prompt": "a", "completion": "b", "label": "maybe"}, "unknown_label", "label is 'maybe', expected true or false"),
        ({"prompt": "a", "completion": "b", "label": 4}, "unknown_label", "label is 4"),
        ({"prompt": "a", "completion": "b", "label": [True]}, "unknown_label", "label is list"),
        ({"prompt": "a", "completion": "b", "label": None}, "no_label", "label is empty"),
        ({"prompt": "a", "completion": "b", "label": float("nan")}, "no_label", "label is empty"),
        ({"prompt": "a", "completion": "b"}, "no_label", "none of label"),
        ({"prompt": "a", "completion": 3, "label": True}, "wrong_type", "completion is int, expected a list of messages"),
        ({"prompt": "a", "label": True}, "missing_field", "response"),
        ({"completion": "b", "label": True}, "missing_field", "prompt"),
        ({"prompt": "a", "completion": " ", "label": True}, "empty_response", "response"),
        ({"prompt": " ", "completion": "b", "label": True}, "empty_prompt", ""),
        ({"prompt": "a", "completion": [USER], "label": True}, "last_turn_not_assistant", "completion is by 'user'"),
        ({"prompt": "a", "completion": "b", "completion_cut_off": "yes", "label": True}, "wrong_type", "completion_cut_off"),
    ],
)  # fmt: skip
def test_a_row_without_a_label_or_a_response_is_dropped_with_its_reason(row, reason, detail):
    good = {"prompt": "Hi?", "completion": "Hello.", "label": True}
    _, (first, found, _) = read(good, row, good | {"label": False})
    assert not isinstance(first, Dropped)
    assert (found.row, found.reason) == (1, reason)
    assert detail in found.detail


def test_a_vote_of_zero_is_no_vote_and_a_scale_is_no_vote():
    up = {"prompt": "Hi?", "response": "Hello.", "rating": 1}
    _, (_, *found) = read(up, *(up | {"rating": zero} for zero in (0, 0.0, "0")))
    assert [(one.reason, one.detail) for one in found] == [
        ("no_label", "rating is 0, which is neither up nor down")
    ] * 3
    # of five stars, one is the worst
    with pytest.raises(DataError, match="with a rank or score"):
        read(up, up | {"rating": 5})


def test_names_that_are_not_known_are_given():
    row = {"question": "Hi?", "said": "Hello.", "vote": "up", "id": 7}
    columns = {"prompt": "question", "response": "said", "label": "vote"}
    source, (found,) = read(row, columns=columns)
    assert (found.prompt, found.chosen, found.label, source.unread) == ([USER], "Hello.", True, ["id"])
    with pytest.raises(ConfigError, match="names nothing_there"):
        read(row, columns=columns | {"label": "nothing_there"})


def test_what_nothing_reads_is_named():
    row = {"prompt": [USER], "completion": [{**ANSWER, "weight": 1}], "label": True, "rating": 5, "user": "x"}
    source, _ = read(row, row)
    assert sorted(source.unread) == ["completion[].weight", "rating", "user"]


def test_a_row_with_half_a_pair_is_not_unpaired():
    for side in ("chosen", "rejected"):
        with pytest.raises(DataError, match="has one of chosen and rejected"):
            read(FORMS["TRL, strings"] | {side: "x"})


def test_a_loss_that_learns_from_pairs_does_not_read_it():
    for wanted, said in (("pairs", "which makes no pairs"), ("lists", "which makes no ranked lists")):
        with pytest.raises(DataError, match=f"unpaired data as KTO learns from .*{said}: train.loss_type=kto or bco"):
            read(FORMS["TRL, strings"], wanted=wanted)


def test_pairs_are_a_good_and_a_bad_response():
    cut = {"prompt": "Hi?", "chosen": "Hello.", "rejected": "Go away.", "rejected_cut_off": True, "margin": 2}
    _, (good, bad, other) = read(cut, {"prompt": "Hi?", "chosen": "a", "rejected": "a"})
    assert [(one.chosen, one.label, set(one.cut_off)) for one in (good, bad)] == [
        ("Hello.", True, set()),
        ("Go away.", False, {"chosen"}),
    ]
    assert (other.row, other.reason) == (1, "identical_responses")


def test_a_cut_off_response_has_no_end_and_special_tokens_stay_text():
    row = {"prompt": "Hi?", "response": "Hello.<|end|>", "label": True}
    tokenizer = make_tiny_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    found, (whole, cut) = stream(row, {**row, "prompt": "Who?", "response_cut_off": True}, tokenizer=tokenizer)
    assert (whole.response_ids.count(end), whole.response_ids[-1], cut.response_ids.count(end)) == (1, end, 0)
    assert cut.response_ids == whole.response_ids[:-1]
    assert found.control == {"<|end|>": 2}


def test_tools_and_calls_reach_the_token_ids_or_the_row_is_dropped():
    tokenizer = make_tiny_tokenizer()
    told = {"role": "tool", "content": "12:00"}
    asked = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    rows = [
        {"prompt": [USER, asked, told], "completion": [ANSWER], "tools": [TOOL], "label": True},
        {"messages": [USER, asked], "tools": [TOOL], "label": False},
    ]
    for row in rows:
        _, (found,) = stream(row, tokenizer=tokenizer)
        assert found.reason == "tools_not_rendered"
    tokenizer.chat_template = TOOL_TEMPLATE
    first, second = (stream(row, tokenizer=tokenizer)[1][0] for row in rows)
    prompt = tokenizer.decode(first.prompt_ids)
    assert '"parameters"' in prompt
    assert "@" in prompt
    assert "12:00" in prompt
    assert '"zone": "UTC"' in tokenizer.decode(second.response_ids)
    assert '"zone": "UTC"' in second.preference.shown("chosen")
    tokenizer.chat_template = TOOL_TEMPLATE.replace("m.tool_calls or []", "[]")
    for row in rows:
        _, (found,) = stream(row, tokenizer=tokenizer)
        assert found.reason == "tool_calls_not_rendered"


def test_a_row_of_another_form_than_its_file_is_told():
    _, (_, found) = read(FORMS["TRL, strings"], FORMS["messages of LLaMA-Factory"])
    assert found.reason == "missing_field"
    assert "the row is unpaired, TRL implicit, messages, the file unpaired, TRL explicit, strings" in found.detail
    _, (_, found) = read(FORMS["TRL, strings"], {"prompt": "a", "chosen": "b", "rejected": "c"})
    assert "the row is TRL explicit, strings, the file unpaired" in found.detail


def labelled(prompt, response, *, label=True):
    return {"prompt": prompt, "response": response, "label": label}


def test_duplicates_are_dropped_and_labels_tell_rows_apart():
    rows = [labelled("a", "x"), labelled("a", "x"), labelled("a", "x", label=False), labelled("a", "y")]
    found, (first, twice, other, last) = stream(*rows)
    assert (twice.row, twice.reason) == (1, "duplicate")
    assert len({one.group_id for one in (first, other, last)}) == 3
    assert (found.read, found.given) == ({"d.jsonl": 4}, 4)


def test_prompts_are_in_one_split_and_held_out_ones_are_kept_apart():
    rows = [labelled(f"{n % 7}?", f"{n}", label=n % 2 == 0) for n in range(40)]
    _, found = stream(*rows, eval_fraction=0.4)
    splits = {}
    for one in found:
        splits.setdefault(tuple(one.prompt_ids), set()).add(one.split)
    assert {len(of_one) for of_one in splits.values()} == {1}
    assert {one.split for one in found} == {"train", "eval"}
    Path("e.jsonl").write_bytes(lines(labelled("3?", "other")))
    _, found = stream(*rows, eval_path="e.jsonl")
    assert [one.reason for one in found if isinstance(one, Dropped)] == ["prompt_is_held_out"] * 6


def by_prompt(found):
    """Prompt, response, and the response beside it, in text, of every group."""
    assert [one.kind for one in found] == ["response", "mismatched"] * (len(found) // 2)
    return [
        (one.preference.prompt[0]["content"], one.preference.chosen, other.preference.chosen)
        for one, other in pairwise(found)
        if one.kind == "response"
    ]


def test_beside_a_response_stands_that_of_the_nearest_other_prompt():
    rows = [labelled(*row) for row in (("a", "a1"), ("a", "a2"), ("b", "b1"), ("b", "b2"), ("c", "c1"))]
    _, found = stream(*rows, mismatched=True)
    assert by_prompt(found) == [
        ("a", "a1", "b1"),
        ("a", "a2", "b1"),
        ("b", "b1", "a2"),
        ("b", "b2", "a2"),
        ("c", "c1", "b2"),
    ]
    for one, other in zip(found[::2], found[1::2], strict=True):
        assert (one.group_id, one.split, one.prompt_ids) == (other.group_id, other.split, other.prompt_ids)
        assert (other.preference.label, other.preference.score) == (None, None)
    # what comes later moves nothing
    _, more = stream(*rows, labelled("d", "d1"), mismatched=True)
    assert more[:10] == found


@pytest.mark.parametrize("good_first", [True, False])
def test_good_and_bad_ones_stand_beside_responses_as_the_data_has_them(good_first):
    """Of pairs, and of rows in which good and bad take turns, the nearest other one is always the second."""
    rows = [labelled(f"{n}?", f"r{n}{label}", label=label) for n in range(6) for label in (good_first, not good_first)]
    _, found = stream(*rows, mismatched=True)
    good = {one.preference.chosen: one.preference.label for one in found[::2]}
    beside = [good[one.preference.chosen] for one in found[1::2]]
    assert beside.count(True) in (5, 6, 7)
    assert by_prompt(found)[4:6] == [
        ("2?", f"r2{good_first}", f"r1{good_first}"),
        ("2?", f"r2{not good_first}", f"r1{not good_first}"),
    ]


def test_a_training_row_has_no_held_out_response_beside_it():
    rows = [labelled(f"{n // 2}?", f"r{n}") for n in range(60)]
    _, found = stream(*rows, mismatched=True, eval_fraction=0.3)
    split_of = {one.preference.chosen: one.split for one in found if one.kind == "response"}
    prompt_of = {one.preference.chosen: one.prompt_ids for one in found if one.kind == "response"}
    assert set(split_of.values()) == {"train", "eval"}
    for one in found[1::2]:
        assert one.split == "eval" or split_of[one.preference.chosen] == "train"
        assert prompt_of[one.preference.chosen] != one.prompt_ids
    # a single held-out prompt has one of the training split
    Path("e.jsonl").write_bytes(lines(labelled("held out", "e1"), labelled("held out", "e2")))
    _, found = stream(*rows[:4], mismatched=True, eval_path="e.jsonl")
    assert [row for row in by_prompt(found) if row[0] == "held out"] == [
        ("held out", "e1", "r0"),
        ("held out", "e2", "r0"),
    ]


def test_one_prompt_alone_is_an_error_with_the_way_out():
    rows = [labelled("a", f"{n}") for n in range(3)]
    with pytest.raises(DataError, match=r"all 3 responses of the train split are to one prompt .*train.loss_type=bco"):
        stream(*rows, mismatched=True)
    assert len(stream(*rows)[1]) == 3


def test_what_stands_beside_a_response_is_as_long_as_the_limit_allows():
    rows = [labelled("a" * 30, "b"), labelled("c", "d" * 40)]
    _, found = stream(*rows, mismatched=True, max_length=60)
    assert len(found) == 4
    assert len(found[1].prompt_ids) + len(found[1].response_ids) == 60
    assert found[1].response_ids == found[2].response_ids[: len(found[1].response_ids)]


def test_a_response_that_is_too_long_is_dropped_in_words_of_its_own():
    rows = [labelled("Hi?", "x" * 200), labelled("Who?", "\n"), labelled("Who?", "y")]
    _, (first, second, last) = stream(*rows, max_length=60)
    assert (first.row, first.reason) == (0, "too_long")
    assert (second.reason, second.detail) == ("empty_response", "response")
    assert last.preference.label


def test_real_pairs_are_responses(tmp_path):
    path = ROOT.parent / "shared" / "data" / "hh_harmless_400.jsonl"
    if not path.is_file():
        pytest.skip("no ../shared/data beside this checkout: real preference data is not part of the project")
    data = DataConfig(path=str(path), max_rows=60, eval_fraction=0.2)
    found = list(ResponseStream(data, make_tiny_tokenizer(), mismatched=True))
    kept = [one for one in found if not isinstance(one, Dropped)]
    labels = [one.preference.label for one in kept if one.kind == "response"]
    assert (labels.count(True), labels.count(False), len(kept)) == (60, 60, 240)


def test_the_rows_of_pairs_and_of_responses_say_the_same():
    rows = preference_rows(5)
    _, found = stream(*rows)
    unpaired = [
        labelled(row["prompt"], row[side], label=side == "chosen") for row in rows for side in ("chosen", "rejected")
    ]
    _, same = stream(*unpaired)
    assert [one.group_id for one in found] == [one.group_id for one in same]
