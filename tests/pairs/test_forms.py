"""What a row says in each form: the prompt's messages and the two responses; what nothing reads is named."""

import re
from pathlib import Path

import pytest

from pipeline.config.experiment import DataConfig
from pipeline.pairs.formats import one_response
from pipeline.pairs.groups import ResponseStream
from pipeline.pairs.messages import RowProblem
from pipeline.pairs.preferences import Dropped, open_source
from pipeline.pairs.splits import Pair, PairStream
from tests.conftest import ROOT, make_tiny_tokenizer
from tests.pairs.inputs import ANSWER, CALL, GOOD, OTHER, TOOL, TOOL_TEMPLATE, USER, lines, parquet
from tests.pairs.pair_rows import build
from tests.pairs.test_preferences import FORMS


def turn(role, content):
    return {"role": role, "content": content}


A, B, C = turn("user", "A"), turn("assistant", "B"), turn("user", "C")
S = turn("system", "S")
DIALOGUE = "\n\nHuman: A\n\nAssistant: B\n\nHuman: C"
# row, prompt, chosen, rejected
SAYS = {
    "HH prompt": (
        {"prompt": f"{DIALOGUE}\n\nAssistant:", "chosen": " D", "rejected": " E\n"},
        [A, B, C], "D", "E",
    ),
    "HH prompt without its first blank lines": (
        {"prompt": "Human: A\n\nAssistant:", "chosen": "D", "rejected": "E"},
        [A], "D", "E",
    ),
    "HH prompt and whole dialogues": (
        {"prompt": f"{DIALOGUE}\n\nAssistant:", "chosen": f"{DIALOGUE}\n\nAssistant: D", "rejected": f"{DIALOGUE}\n\nAssistant: E"},
        [A, B, C], "D", "E",
    ),
    "HH prompt and a side that repeats it": (
        {"prompt": f"{DIALOGUE}\n\nAssistant:", "chosen": f"{DIALOGUE}\n\nAssistant: D", "rejected": "E"},
        [A, B, C], "D", "E",
    ),
    "HH dialogues beside the last request": (
        {"prompt": "C", "chosen": f"{DIALOGUE}\n\nAssistant: D", "rejected": f"{DIALOGUE}\n\nAssistant: E"},
        [A, B, C], "D", "E",
    ),
    "HH with a system message": (
        {"system": "S", "chosen": f"{DIALOGUE}\n\nAssistant: D", "rejected": f"{DIALOGUE}\n\nAssistant: E"},
        [S, A, B, C], "D", "E",
    ),
    "a dialogue that is no prompt of HH": (
        {"prompt": "Explain \n\nHuman: x", "chosen": "D", "rejected": "E"},
        [turn("user", "Explain \n\nHuman: x")], "D", "E",
    ),
    "instruction": ({"instruction": "A", "input": "", "chosen": "D", "rejected": "E"}, [A], "D", "E"),
    "instruction and input": (
        {"instruction": "A", "input": "x", "system": "S", "chosen": "D", "rejected": "E"},
        [S, turn("user", "A\nx")], "D", "E",
    ),
    "input without instruction": ({"instruction": "", "input": "A", "chosen": "D", "rejected": "E"}, [A], "D", "E"),
    "instruction and history": (
        {"instruction": "C", "input": None, "history": [["A", "B"]], "chosen": "D", "rejected": "E"},
        [A, B, C], "D", "E",
    ),
    "instruction beside whole conversations": (
        {"instruction": "A", "chosen": [A, turn("assistant", "D")], "rejected": [A, turn("assistant", "E")]},
        [A], "D", "E",
    ),
    "messages beside responses": ({"messages": [A, B, C], "chosen": ANSWER, "rejected": "E"}, [A, B, C], "Hello.", "E"),
    "messages beside whole conversations": (
        {"messages": [USER, ANSWER], "chosen": [A, turn("assistant", "D")], "rejected": [A, turn("assistant", "E")]},
        [A], "D", "E",
    ),
    "a prompt that the responses repeat": (
        {"prompt": [S, A], "chosen": [S, A, turn("assistant", "D")], "rejected": [A, turn("assistant", "E")]},
        [S, A], "D", "E",
    ),
    "parts": (
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "x"}]}],
         "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "D"}]}], "rejected": [{"type": "text", "text": "E"}]},
        [turn("user", "Ax")], "D", "E",
    ),
    "a system message that is said twice": (
        {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "A"}], "system": "S", "chosen": "D", "rejected": "E"},
        [S, A], "D", "E",
    ),
}  # fmt: skip


def read(*rows, **data):
    Path("d.jsonl").write_bytes(lines(*rows))
    return source_of("d.jsonl", **data)


def source_of(path, **data):
    source = open_source(path, DataConfig(path=path, **data))
    return source, list(source.preferences())


@pytest.mark.parametrize("name", SAYS)
def test_a_row_says(name):
    row, prompt, chosen, rejected = SAYS[name]
    _, (found,) = read(row)
    assert not isinstance(found, Dropped), found
    assert (found.prompt, found.chosen, found.rejected) == (prompt, chosen, rejected)


def test_plain_text_keeps_a_dialogue_as_it_is():
    row = {"prompt": f"{DIALOGUE}\n\nAssistant:", "chosen": " D", "rejected": " E"}
    source, (found,) = read(row, template="none")
    assert source.format == "TRL explicit, strings"
    assert (found.prompt[0]["content"], found.chosen) == (row["prompt"], " D")


def test_a_file_of_messages_as_csv_is_that_of_lines():
    text = (
        b'chosen,rejected\n"[{""role"": ""user"", ""content"": ""A""}, {""role"": ""assistant"", ""content"": ""D""}]",'
    )
    Path("d.csv").write_bytes(text + text.partition(b"\n")[2].replace(b"D", b"E").rstrip(b",") + b"\n")
    _, (found,) = source_of("d.csv")
    assert (found.prompt, found.chosen, found.rejected) == ([A], "D", "E")


def test_tool_calls_and_tools_are_kept_in_the_form_that_templates_take():
    asked = {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "index": None, "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
    ]}  # fmt: skip
    told = {"role": "tool", "content": "12:00", "tool_call_id": "1", "name": "clock"}
    row = {
        "prompt": [USER, asked, told],
        "chosen": [ANSWER],
        "rejected": [{**OTHER, "tool_calls": [CALL]}],
        "tools": f"[{TOOL}]".replace("'", '"'),
    }
    for source, (found,) in (read(row), parquet_of(row)):
        assert not source.unread
        assert found.tools == [TOOL]
        assert found.prompt[1] == {"role": "assistant", "content": "", "tool_calls": [{"id": "1", **CALL}]}
        assert found.prompt[2] == told
        assert (found.chosen, found.rejected, found.calls) == ("Hello.", "Go away.", {"rejected": [CALL]})
        assert (
            found.shown("rejected")
            == 'Go away.\n{"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}'
        )


def parquet_of(row):
    """The row as Parquet, where all messages have all fields."""
    Path("d.parquet").write_bytes(parquet([row, row]))
    source, found = source_of("d.parquet", max_rows=1)
    return source, found


def test_a_response_of_a_tool_call_alone_is_one():
    row = {
        "prompt": [USER],
        "chosen": [{"role": "assistant", "tool_calls": [CALL]}],
        "rejected": [{"role": "assistant", "content": ""}],
    }
    _, (found, dropped) = read({**row, "rejected": [OTHER]}, row)
    assert (found.chosen, found.calls) == ("", {"chosen": [CALL]})
    assert (dropped.reason, dropped.detail) == ("empty_response", "rejected")
    # two calls of the same are one response
    _, (same,) = read({**row, "rejected": row["chosen"]})
    assert same.reason == "identical_responses"


# prompt and responses of every form of messages, the second one with a call
_ASKED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
_TURNS = [USER, _ASKED, turn("tool", "12:00")]
_SHAREGPT = [
    {"from": "human", "value": "Hi?"},
    {"from": "function_call", "value": None, "tool_calls": [CALL]},
    {"from": "observation", "value": "12:00"},
]
OF_TOOLS = {
    "TRL explicit": {"prompt": _TURNS, "chosen": [ANSWER], "rejected": [_ASKED]},
    "TRL implicit": {"chosen": [*_TURNS, ANSWER], "rejected": [*_TURNS, _ASKED]},
    "UltraFeedback-binarized": {"prompt": "Hi?", "chosen": [*_TURNS, ANSWER], "rejected": [*_TURNS, _ASKED]},
    "sharegpt": {"conversations": _SHAREGPT, "chosen": ANSWER, "rejected": _ASKED},
    "messages beside responses": {"messages": _TURNS, "chosen": ANSWER, "rejected": _ASKED},
    "unpaired": {"prompt": _TURNS, "completion": [_ASKED], "label": True},
    "unpaired messages": {"messages": [*_TURNS, _ASKED], "label": True},
    "unpaired sharegpt": {
        "conversations": [*_SHAREGPT, {"from": "gpt", "value": "", "tool_calls": [CALL]}],
        "kto_tag": True,
    },
    "ranked": {"prompt": _TURNS, "responses": [[ANSWER], [_ASKED]], "scores": [1, 2]},
    "ranked objects": {
        "prompt": _TURNS,
        "completions": [{"message": ANSWER, "score": 1}, {"message": _ASKED, "score": 2}],
    },
}
# of these, a prompt is a text, and tools stand beside it
OF_TEXTS = {
    "TRL explicit, strings": {"prompt": "Hi?", "chosen": "a", "rejected": _ASKED},
    "Alpaca": {"instruction": "Hi?", "chosen": "a", "rejected": _ASKED},
    "HH-RLHF": {"chosen": f"{DIALOGUE}\n\nAssistant: D", "rejected": f"{DIALOGUE}\n\nAssistant: E"},
    "HH-RLHF prompt": {"prompt": f"{DIALOGUE}\n\nAssistant:", "chosen": "D", "rejected": "E"},
    "TRL implicit, strings": {"chosen": "Hi? a", "rejected": "Hi? b"},
    "unpaired": {"prompt": "Hi?", "completion": _ASKED, "label": True},
    "unpaired Alpaca": {"instruction": "Hi?", "output": "a", "label": False},
    "ranked": {"prompt": "Hi?", "responses": ["a", _ASKED], "scores": [1, 2]},
    "UltraFeedback": {
        "instruction": "Hi?",
        "completions": [{"response": "a", "overall_score": 1}, {"response": "b", "overall_score": 2}],
    },
}


def texts_of(row, tokenizer):
    """Everything that a row becomes, as pairs, responses and lists, decoded from its token ids; and why it becomes nothing."""
    Path("d.jsonl").write_bytes(lines(row))
    data = DataConfig(path="d.jsonl", eval_fraction=0)
    single = "label" in row or "kto_tag" in row
    streams = [] if single else [PairStream(data, tokenizer), ResponseStream(data, tokenizer, wanted="lists")]
    streams.append(ResponseStream(data, tokenizer))
    for stream in streams:
        items = list(stream)
        kept = [item for item in items if not isinstance(item, Dropped)]
        responses = [
            ids
            for item in kept
            for ids in ([item.chosen_ids, item.rejected_ids] if isinstance(item, Pair) else [item.response_ids])
        ]
        prompts = [item.prompt_ids for item in kept]
        yield (
            [tokenizer.decode(ids) for ids in prompts],
            [tokenizer.decode(ids) for ids in responses],
            [item.reason for item in items if isinstance(item, Dropped)],
        )


@pytest.mark.parametrize("name", [*OF_TOOLS, *(f"text: {name}" for name in OF_TEXTS)])
def test_tools_and_calls_of_every_form_reach_the_token_ids_or_are_told(name):
    row = OF_TOOLS.get(name) or OF_TEXTS[name.removeprefix("text: ")]
    row = {**row, "tools": [TOOL]}
    called = "tool_calls" in str(row)
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    for prompts, responses, dropped in texts_of(row, tokenizer):
        assert prompts
        assert not dropped
        assert all('"parameters"' in prompt for prompt in prompts)
        if name in OF_TOOLS:
            assert all('@{"name": "clock"' in prompt and "12:00" in prompt for prompt in prompts)
        assert any('@{"name": "clock"' in response for response in responses) is called
    for template, reason in (
        (None, "tools_not_rendered"),
        (TOOL_TEMPLATE.replace("m.tool_calls or []", "[]"), "tool_calls_not_rendered"),
    ):
        tokenizer = make_tiny_tokenizer()
        tokenizer.chat_template = template or tokenizer.chat_template
        for prompts, _, dropped in texts_of(row, tokenizer) if called or template is None else ():
            # of responses, one without a call may be left: then nothing of it was lost
            assert set(dropped) <= {reason, "fewer_than_two_responses"}
            assert dropped
            assert not prompts or (name not in OF_TOOLS and template)


UNREAD = {
    "columns": ({**GOOD, "score": 1, "source": "x"}, ["score", "source"]),
    "a column without a value": ({**GOOD, "score": None}, []),
    "what refscore writes": ({**GOOD, "topic": "t", "margin": 1, "provenance": {"a": 1}, "chosen_cut_off": False}, []),
    "a topic that is no text": ({**GOOD, "topic": 3}, ["topic"]),
    "a system message that is no text": ({**GOOD, "system": ["x"]}, ["system"]),
    "instruction beside a prompt": ({**GOOD, "instruction": "x", "input": "y"}, ["instruction", "input"]),
    "a message's field": ({"prompt": [{**USER, "name": "Ann"}], "chosen": [{**ANSWER, "weight": 1}], "rejected": "b"}, ["prompt[].name", "chosen[].weight"]),
    "a message's field without a value": ({"prompt": [{**USER, "name": None}], "chosen": "a", "rejected": "b"}, []),
    "a form's other columns": ({"conversations": [{"from": "human", "value": "A"}], "instruction": "z", "chosen": "a", "rejected": "b"}, ["instruction"]),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREAD)
def test_what_nothing_reads_is_named(name):
    row, unread = UNREAD[name]
    source, _ = read(row, GOOD if "prompt" in row and isinstance(row["prompt"], str) else row)
    assert source.unread == unread


def test_a_column_that_another_stands_for_is_unread_and_one_that_is_named_is_read():
    source, (found,) = read({**GOOD, "question": "Who?", "other": 1}, columns={"prompt": "question"})
    assert found.prompt[0]["content"] == "Who?"
    assert source.unread == ["prompt", "other"]


def test_one_response_alone_is_read_alike():
    parts = {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "A"}]}],
        "response": [turn("assistant", "B")],
    }
    assert one_response(parts) == ([A], "B")
    assert one_response({"prompt": "A", "system": "S", "response": "B"}) == ([S, A], "B")
    for row, reason in (
        ({"prompt": [A, B], "response": "C"}, "assistant_after_assistant"),
        ({"prompt": "A", "response": [{**B, "tool_calls": [CALL]}]}, "tool_calls_not_scored"),
        ({"prompt": "A", "response": "B", "tools": [TOOL]}, "tool_calls_not_scored"),
        ({"prompt": None, "response": "B"}, "missing_field"),
        ({"prompt": "A", "response": " "}, "empty_response"),
    ):
        with pytest.raises(RowProblem) as problem:
            one_response(row)
        assert problem.value.reason == reason


def test_every_reason_stands_in_the_page():
    sources = "".join(path.read_text() for path in (ROOT / "pipeline/pairs").rglob("*.py"))
    reasons = set(re.findall(r"""(?:RowProblem\(|drop\(|Dropped\([\w.]+, [\w.]+,)\s*"(\w+)\"""", sources))
    assert {"missing_field", "too_long", "duplicate", "tools_not_rendered", "response_of_many_messages"} <= reasons
    page = (ROOT / "docs/data.md").read_text()
    assert {reason for reason in reasons if f"`{reason}`" not in page} == {"tool_calls_not_scored"}


LITERAL = {
    "TRL explicit, strings": "<|user|>Hi?<|end|>\n<|assistant|>",
    "TRL explicit, messages": "<|system|>Be brief.<|end|>\n<|user|>Hi?<|end|>\n<|assistant|>",
    "TRL implicit, messages": "<|user|>A<|end|>\n<|assistant|>B<|end|>\n<|user|>Hi?<|end|>\n<|assistant|>",
    "UltraFeedback-binarized": "<|user|>Hi?<|end|>\n<|assistant|>",
    "HH-RLHF dialogue strings": "<|user|>A<|end|>\n<|assistant|>B<|end|>\n<|user|>Hi?<|end|>\n<|assistant|>",
    "sharegpt": "<|system|>Be brief.<|end|>\n<|user|>Hi?<|end|>\n<|assistant|>",
}


@pytest.mark.parametrize("name", LITERAL)
@pytest.mark.parametrize("template", ["chat", "none"])
def test_the_token_ids_of_the_forms_are_those_of_this_text(name, template, tmp_path):
    """Written down: scores are stored by these ids, and other ids would be scored again."""
    tokenizer = make_tiny_tokenizer()
    (pair,) = build(tmp_path, tokenizer, [FORMS[name][0]], eval_fraction=0, template=template).pairs
    text = LITERAL[name]
    if template == "none":
        text = re.sub(r"<\|end\|>\n|<\|\w+\|>", "", text)
    for response, ids in (("Hello.", pair.chosen_ids), ("Go away.", pair.rejected_ids)):
        assert pair.prompt_ids == tokenizer(text)["input_ids"]
        assert pair.prompt_ids + ids == tokenizer(text + response + "<|end|>")["input_ids"]
