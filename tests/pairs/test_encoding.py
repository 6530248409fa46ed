"""Token ids: boundary, end of turn, length, and what is dropped on the way."""

import pytest

from pipeline.config.experiment import DataConfig
from pipeline.errors import ConfigError, DataError
from pipeline.pairs.encoding import Encoded, Encoder, end_of_turn_id
from pipeline.pairs.preferences import Dropped, Preference
from pipeline.pairs.splits import build_pairs, count_reasons
from tests.conftest import make_tiny_tokenizer, write_rows
from tests.pairs.pair_rows import build, row


@pytest.fixture(scope="module")
def tokenizer():
    return make_tiny_tokenizer()


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


def test_the_end_of_turn_need_not_be_one_of_the_tokenizers_named_tokens():
    """As Gemma's <end_of_turn>: added, and neither the end of sequence nor the padding."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = "<|system|>"
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert end not in tokenizer.all_special_ids
    assert end_of_turn_id(tokenizer) == end
    # and one of the named tokens will do without having been added
    tokenizer = make_tiny_tokenizer()
    added = type(tokenizer).added_tokens_decoder
    try:
        type(tokenizer).added_tokens_decoder = property(lambda self: {})
        assert end_of_turn_id(tokenizer) == end
    finally:
        type(tokenizer).added_tokens_decoder = added


def test_the_end_of_turn_is_asked_for_with_a_users_turn_before_it_and_after_the_last_text():
    tokenizer = make_tiny_tokenizer()
    # strict as many templates are, with a title that repeats the text, and a beginning that the tokenizer adds by itself
    tokenizer.chat_template = (
        "{{ raise_exception('roles') if messages[0].role != 'user' or not messages[0].content }}"
        "{{ raise_exception('roles') if messages[1].role != 'assistant' }}"
        "{{ messages[1].content }}<|system|><|user|>{{ messages[0].content }}<|end|>"
        "<|assistant|>{{ messages[1].content }}<|end|>"
    )
    assert end_of_turn_id(starting_by_itself(tokenizer)) == tokenizer.convert_tokens_to_ids("<|end|>")


def test_without_a_template_or_an_end_in_it_the_end_of_sequence_ends_a_turn():
    tokenizer = make_tiny_tokenizer()
    tokenizer.eos_token = "<|system|>"
    for template in (None, "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"):
        tokenizer.chat_template = template
        assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|system|>")
    # nor is an answer that the template leaves out, or refuses, an end
    tokenizer.chat_template = "{{ messages[0].content }}<|end|>"
    assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|system|>")
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ConfigError, match=r"refuses a user's turn with its answer \(no\)"):
        end_of_turn_id(tokenizer)
    tokenizer.chat_template = None
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="end-of-sequence"):
        end_of_turn_id(tokenizer)
    with pytest.raises(ConfigError, match="end-of-sequence"):
        Encoder(DataConfig(path="x", template="none"), tokenizer)


def starting_by_itself(tokenizer):
    """A tokenizer that puts <|system|> before every text unless it is told not to."""
    from tokenizers.processors import TemplateProcessing

    start = "<|system|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.convert_tokens_to_ids(start))]
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer.convert_tokens_to_ids(start)
    return tokenizer


@pytest.mark.parametrize("template", ["chat", "none"])
def test_what_the_tokenizer_adds_by_itself_is_left_out(tmp_path, tokenizer, template):
    alike = [
        build(tmp_path, one, [row()], eval_fraction=0, template=template).pairs[0]
        for one in (tokenizer, starting_by_itself(make_tiny_tokenizer()))
    ]
    assert alike[0] == alike[1]


@pytest.mark.parametrize(("adds", "start"), [(True, "<|system|>"), (False, ""), (None, "")])
def test_plain_text_begins_as_the_tokenizer_says(tmp_path, adds, start):
    tokenizer = make_tiny_tokenizer()
    tokenizer.bos_token = "<|system|>"
    if adds is not None:
        tokenizer.add_bos_token = adds
    turns = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "Q: a. A:"}]
    (pair,) = build(tmp_path, tokenizer, [row(turns, " b", " c")], template="none", eval_fraction=0).pairs
    assert tokenizer.decode(pair.prompt_ids) == f"{start}Be brief. Q: a. A:"
    assert tokenizer.decode(pair.chosen_ids) == " b<|end|>"
    # one that is asked to begin texts and has no such token begins them with nothing
    tokenizer.bos_token = None
    (pair,) = build(tmp_path, tokenizer, [row(turns, " b", " c")], template="none", eval_fraction=0).pairs
    assert tokenizer.decode(pair.prompt_ids) == "Be brief. Q: a. A:"


def test_plain_text_ends_with_the_end_of_sequence_and_a_chat_with_the_end_of_the_turn(tmp_path):
    tokenizer = make_tiny_tokenizer()
    tokenizer.eos_token = "<|system|>"
    for template, end in (("chat", "<|end|>"), ("none", "<|system|>")):
        (pair,) = build(tmp_path, tokenizer, [row()], template=template, eval_fraction=0).pairs
        assert tokenizer.decode(pair.chosen_ids) == f"Hello.{end}"


def test_a_response_that_was_cut_off_has_no_end_and_is_counted(tmp_path):
    tokenizer = make_tiny_tokenizer()
    tokenizer.eos_token = "<|system|>"
    for template, end in (("chat", "<|end|>"), ("none", "<|system|>")):
        rows = [row(rejected_cut_off=True, chosen_cut_off=False), row(prompt="Who?", chosen_cut_off=True)]
        first, second = build(tmp_path, tokenizer, rows, template=template, eval_fraction=0).pairs
        assert [tokenizer.decode(ids) for ids in (first.chosen_ids, first.rejected_ids)] == [f"Hello.{end}", "Go away."]
        assert [tokenizer.decode(ids) for ids in (second.chosen_ids, second.rejected_ids)] == [
            "Hello.",
            f"Go away.{end}",
        ]


def test_whether_a_response_was_cut_off_is_true_or_false(tmp_path):
    found = build(tmp_path, make_tiny_tokenizer(), [row(), row(prompt="Who?", chosen_cut_off="no")], eval_fraction=0)
    assert [(one.row, one.reason) for one in found.dropped] == [(1, "wrong_type")]
    assert "chosen_cut_off is str" in found.dropped[0].detail


def preferences(*rows):
    return [
        Preference("s", at, [{"role": "user", "content": one["prompt"]}], one["chosen"], one["rejected"])
        for at, one in enumerate(rows)
    ]


def test_one_side_alone_is_encoded_as_it_is_in_a_pair(tokenizer):
    encoder = Encoder(DataConfig(path="x"), tokenizer)
    item, dropped = preferences(row())[0], Dropped("s", 1, "duplicate")
    (pair, _), (alone, kept) = list(encoder.both([item, dropped])), list(encoder.chosen([item, dropped]))
    assert kept is dropped
    assert alone == Encoded(item, pair.prompt_ids, pair.responses[:1])


def encoded(tokenizer, *rows, positions=None, **data):
    return list(Encoder(DataConfig(path="x", **data), tokenizer, positions).both(preferences(*rows)))


def test_what_is_dropped_says_where_and_what(tokenizer):
    (pair,) = encoded(tokenizer, row())
    prompt, long = len(pair.prompt_ids), len(pair.prompt_ids) + max(map(len, pair.responses))
    assert encoded(tokenizer, row(), max_length=long) == [pair]
    assert encoded(tokenizer, row("Hi!"), row(), max_length=long - 1)[1] == Dropped(
        "s", 1, "too_long", f"{long} tokens, data.max_length is {long - 1}"
    )
    cut = {"max_length": prompt + 1, "too_long": "truncate_response"}
    assert [len(side) for side in encoded(tokenizer, row(), **cut)[0].responses] == [1, 1]
    cut["max_length"] = prompt
    assert encoded(tokenizer, row("Hi!"), row(), **cut)[1] == Dropped(
        "s", 1, "prompt_too_long", f"{prompt} tokens, data.max_length is {prompt}"
    )


def test_the_models_positions_limit_what_the_configuration_does_not(tokenizer):
    (pair,) = encoded(tokenizer, row())
    long = len(pair.prompt_ids) + max(map(len, pair.responses))
    assert encoded(tokenizer, row(), positions=long) == [pair]
    said = encoded(tokenizer, row(), positions=long - 1)
    assert said == [Dropped("s", 0, "too_long", f"{long} tokens, the model reads {long - 1}")]
    both = encoded(tokenizer, row(), positions=long - 1, max_length=long - 1)
    assert both == [Dropped("s", 0, "too_long", f"{long} tokens, data.max_length is {long - 1}")]


def test_equal_responses_are_told_from_those_that_were_cut_equal(tokenizer):
    same = row("Same start?", "z" * 60 + "a", "z" * 60 + "b")
    cut = {"max_length": 40, "too_long": "truncate_response"}
    left = 40 - len(encoded(tokenizer, same)[0].prompt_ids)
    assert encoded(tokenizer, row(), same, **cut)[1] == Dropped(
        "s", 1, "identical_after_truncation", f"equal in the first {left} tokens"
    )
    # texts that differ in nothing but what the template strips
    other = make_tiny_tokenizer()
    other.chat_template = other.chat_template.replace("message['content']", "message['content'] | trim")
    equal = row(chosen="Yes", rejected="Yes ")
    wanted = Dropped("s", 1, "identical_responses", "equal token ids")
    assert encoded(other, row(), equal)[1] == wanted
    assert encoded(other, row(), equal, too_long="truncate_response")[1] == wanted
    # exactly as long as may be, in a run that cuts nothing
    (pair,) = encoded(other, row(chosen="Yes", rejected="No"))
    length = len(pair.prompt_ids) + len(pair.responses[0])
    assert encoded(other, row("Hi?", "a", "b"), equal, max_length=length)[1] == wanted


def test_a_prompt_that_a_response_changes_names_the_token(tokenizer):
    other = make_tiny_tokenizer()
    other.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{{ 'think' if messages[0].content == 'Hi?' }}{% endif %}"
    )
    before = len(other("<|user|>Hi?<|end|><|assistant|>")["input_ids"])
    whole = before + len(other("think")["input_ids"])
    assert encoded(other, row("Ho?"), row())[1] == Dropped(
        "s", 1, "prompt_not_a_prefix", f"chosen: token {before} of {whole} differs once a response follows"
    )
    # nothing but the prompt's end is missing
    other.chat_template = "{% if add_generation_prompt %}a<|end|>b{% else %}a{% endif %}"
    assert [found.detail for found in encoded(other, row())] == ["chosen: token 1 of 3 differs once a response follows"]


def test_a_prompt_without_a_token_and_a_template_that_refuses_are_said(tokenizer):
    other = make_tiny_tokenizer()
    other.chat_template = "{% for m in messages %}{{ m['content'] if m.role == 'assistant' }}{% endfor %}"
    assert encoded(other, row())[0] == Dropped("s", 0, "empty_prompt", "no token")
    other.chat_template = "{{ raise_exception('x' * 300) if messages[0].content == 'Ho?' }}" + tokenizer.chat_template
    first, second = encoded(other, row(), row("Ho?"))
    assert isinstance(first, Encoded)
    assert second == Dropped("s", 1, "template_refused", "x" * 200)


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
