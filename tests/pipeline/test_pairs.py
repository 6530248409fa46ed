"""Token ids: boundary, end of turn, length, split by prompt, identities."""

import pytest

from pipeline.config import DataConfig
from pipeline.errors import ConfigError, DataError
from pipeline.pairs import build_pairs, count_reasons
from pipeline.token_ids import end_of_turn_id
from tests.conftest import make_tiny_tokenizer, preference_rows, write_rows


@pytest.fixture(scope="module")
def tokenizer():
    return make_tiny_tokenizer()


def build(tmp_path, tokenizer, rows, **data):
    return build_pairs(DataConfig(path=str(write_rows(tmp_path / "d.jsonl", rows)), **data), tokenizer)


def row(prompt="Hi?", chosen="Hello.", rejected="Go away."):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_the_template_is_applied_once_and_the_response_ends_the_turn(tmp_path, tokenizer):
    (pair,) = build(tmp_path, tokenizer, [row()], eval_fraction=0).pairs
    assert tokenizer.decode(pair.prompt_ids) == "<|user|>Hi?<|end|>\n<|assistant|>"
    # the newline that the template puts after the turn is not the response's
    assert tokenizer.decode(pair.chosen_ids) == "Hello.<|end|>"
    assert tokenizer.decode(pair.rejected_ids) == "Go away.<|end|>"


def test_a_response_that_holds_the_end_token_is_kept_to_its_last_one(tmp_path, tokenizer):
    (pair,) = build(tmp_path, tokenizer, [row(chosen="First.<|end|>Second.")], eval_fraction=0).pairs
    assert tokenizer.decode(pair.chosen_ids) == "First.<|end|>Second.<|end|>"


def test_ids_are_those_of_the_whole_conversation(tmp_path, tokenizer):
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    (pair,) = build(tmp_path, tokenizer, [row(prompt=turns)], eval_fraction=0).pairs
    whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": "Hello."}], return_dict=False)
    assert pair.prompt_ids + pair.chosen_ids == whole[: len(pair.prompt_ids) + len(pair.chosen_ids)]


def test_the_end_of_turn_is_read_off_the_template_not_the_eos_token(tokenizer):
    other = make_tiny_tokenizer()
    other.eos_token = "<|system|>"
    assert end_of_turn_id(other) == end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|end|>")


def test_a_template_whose_prompt_is_not_a_prefix_drops_the_row(tmp_path):
    tokenizer = make_tiny_tokenizer()
    # as thinking templates do: what stands after the prompt depends on whether a response follows
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> think {% endif %}"
    )
    with pytest.raises(DataError, match="prompt_not_a_prefix"):
        build(tmp_path, tokenizer, [row()])


def test_a_template_that_refuses_a_row_drops_it(tmp_path):
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ raise_exception('no system role') if messages[0].role == 'system' }}" + tokenizer.chat_template
    )
    rows = [row(prompt=[{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]), row(), row("Again?")]
    found = build(tmp_path, tokenizer, [{**r, "prompt": r["prompt"]} for r in rows[1:]], eval_fraction=0)
    assert len(found.pairs) == 2
    found = build_pairs(
        DataConfig(
            path=[
                str(write_rows(tmp_path / "a.jsonl", rows[1:])),
                str(write_rows(tmp_path / "b.jsonl", rows[:1])),
            ],
            eval_fraction=0,
        ),
        tokenizer,
    )
    assert count_reasons(found.dropped) == {"template_refused": 1}
    assert "no system role" in found.dropped[0].detail


def test_plain_text_needs_no_template_and_chat_without_one_is_refused(tmp_path):
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = None
    (pair,) = build(tmp_path, tokenizer, [row("Q: a. A:", " b", " c")], template="none", eval_fraction=0).pairs
    assert tokenizer.decode(pair.prompt_ids + pair.chosen_ids) == "Q: a. A: b<|end|>"
    with pytest.raises(ConfigError, match=r"data\.template=none"):
        build(tmp_path, tokenizer, [row()])


def test_long_pairs_are_dropped_or_their_responses_cut(tmp_path, tokenizer):
    rows = [row(), row("Long?", "x" * 80, "y" * 80), row("Same start?", "z" * 60 + "a", "z" * 60 + "b"), row("p" * 99)]
    dropped = build(tmp_path, tokenizer, rows, max_length=40, eval_fraction=0)
    assert (len(dropped.pairs), count_reasons(dropped.dropped)) == (1, {"too_long": 3})
    cut = build(tmp_path, tokenizer, rows, max_length=40, too_long="truncate_response", eval_fraction=0)
    assert count_reasons(cut.dropped) == {"identical_after_truncation": 1, "prompt_too_long": 1}
    long = cut.pairs[1]
    assert len(long.prompt_ids) + len(long.chosen_ids) == 40
    # a cut response was not ended by its author
    assert long.chosen_ids[-1] != end_of_turn_id(tokenizer)


def test_the_split_is_by_prompt_and_does_not_move_when_rows_are_added(tmp_path, tokenizer):
    rows = [row(f"Question {n // 2}?", f"Good {n}.", f"Bad {n}.") for n in range(80)]
    before = build(tmp_path, tokenizer, rows, eval_fraction=0.3)
    sides = {}
    for pair in before.pairs:
        sides.setdefault(tuple(pair.prompt_ids), set()).add(pair.split)
    assert all(len(side) == 1 for side in sides.values())
    assert {"train", "eval"} == set().union(*sides.values())
    after = build(tmp_path, tokenizer, rows[::-1] + [row(f"More {n}?") for n in range(20)], eval_fraction=0.3)
    splits = {pair.pair_id: pair.split for pair in after.pairs}
    assert all(splits[pair.pair_id] == pair.split for pair in before.pairs)


def test_a_prompt_of_the_held_out_file_leaves_the_training_data(tmp_path, tokenizer):
    held_out = write_rows(tmp_path / "eval.jsonl", [row("Shared?")])
    found = build(tmp_path, tokenizer, [row("Shared?", "Other.", "Words."), row("Mine?")], eval_path=str(held_out))
    assert [(pair.split, pair.preference.prompt[0]["content"]) for pair in found.pairs] == [
        ("eval", "Shared?"),
        ("train", "Mine?"),
    ]
    assert count_reasons(found.dropped) == {"prompt_is_held_out": 1}


def test_pair_ids_depend_on_tokens_and_split_rule_only(tmp_path, tokenizer):
    rows = preference_rows(6)
    first = [pair.pair_id for pair in build(tmp_path, tokenizer, rows, eval_fraction=0).pairs]
    turned = [pair.pair_id for pair in build(tmp_path, tokenizer, rows[::-1], eval_fraction=0).pairs]
    assert first == turned[::-1]
    other = [pair.pair_id for pair in build(tmp_path, tokenizer, rows, eval_fraction=0.01).pairs]
    assert not set(first) & set(other)


def test_a_repeated_pair_is_kept_once_and_said(tmp_path, tokenizer):
    found = build(tmp_path, tokenizer, [row(), row(), row("Other?")], eval_fraction=0)
    assert (len(found.pairs), count_reasons(found.dropped)) == (2, {"duplicate": 1})


def test_nothing_left_is_an_error_with_the_reasons(tmp_path, tokenizer):
    with pytest.raises(DataError, match="1 x too_long"):
        build(tmp_path, tokenizer, [row()], max_length=3)
