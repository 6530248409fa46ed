"""Ranked data: scores and ranks wherever they stand, the pairs that a list makes, and how much better the data says chosen is."""

from pathlib import Path

import pytest

from pipeline.config.experiment import DataConfig
from pipeline.errors import ConfigError, DataError
from pipeline.pairs.groups import ResponseStream
from pipeline.pairs.preferences import Dropped, open_source
from pipeline.pairs.splits import PairStream
from tests.conftest import make_tiny_tokenizer
from tests.pairs.inputs import ANSWER, CALL, GOOD, TOOL, TOOL_TEMPLATE, USER, lines, parquet

TEXTS = ["bad", "best", "good"]
NUMBERS = [1, 5, 3]
HH = "\n\nHuman: Hi?\n\nAssistant: "
# every row ranks best, good, bad
FORMS = {
    "scores beside responses": {"prompt": "Hi?", "responses": TEXTS, "scores": NUMBERS},
    "ratings beside completions": {"prompt": [USER], "completions": TEXTS, "ratings": NUMBERS},
    "ranks beside responses": {"prompt": "Hi?", "responses": TEXTS, "ranks": [3, 1, 2]},
    "distilabel": {"instruction": "Hi?", "generations": TEXTS, "ratings": [1.0, 5.0, 3.0]},
    "messages": {"prompt": [USER], "responses": [[ANSWER | {"content": text}] for text in TEXTS], "scores": NUMBERS},
    "conversations": {"responses": [[USER, ANSWER | {"content": text}] for text in TEXTS], "scores": NUMBERS},
    "UltraFeedback": {
        "instruction": "Hi?",
        "completions": [{"response": text, "overall_score": number} for text, number in zip(TEXTS, NUMBERS, strict=True)],
    },
    "UltraFeedback, fine-grained": {
        "instruction": "Hi?",
        "completions": [{"response": text, "fine-grained_score": number} for text, number in zip(TEXTS, NUMBERS, strict=True)],
    },
    "Nectar": {
        "prompt": HH,
        "answers": [{"answer": text, "rank": rank} for text, rank in zip(TEXTS, (3.0, 1.0, 2.0), strict=True)],
    },
}  # fmt: skip


def source_of(*rows, wanted, name="d.jsonl", content=None, **data):
    Path(name).write_bytes(lines(*rows) if content is None else content)
    source = open_source(name, DataConfig(path=name, **data), wanted)
    return source, list(source.preferences())


def pairs_of(found):
    return [(one.chosen, one.rejected, one.margin) for one in found]


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_a_list_of_the_best_first(name):
    step = 1 if "rank" in name or name == "Nectar" else 2
    for more in ({}, {"name": "d.parquet", "content": parquet([FORMS[name]])}):
        source, found = source_of(FORMS[name], wanted="lists", **more)
        assert source.format.startswith("ranked, ")
        assert not source.unread
        assert [one.chosen for one in found] == ["best", "good", "bad"]
        assert all(one.prompt == [USER] and one.single for one in found)
        assert [one.score - found[2].score for one in found] == [2 * step, step, 0]
    _, found = source_of(FORMS[name], wanted="pairs")
    assert pairs_of(found) == [("best", "bad", 2 * step)]
    _, found = source_of(FORMS[name], wanted="pairs", lists="all_pairs")
    assert pairs_of(found) == [("best", "good", step), ("best", "bad", 2 * step), ("good", "bad", step)]
    _, found = source_of(FORMS[name], wanted="responses")
    assert [(one.chosen, one.label) for one in found] == [("best", True), ("bad", False)]


def ranked(*scores, prompt="Hi?"):
    return {"prompt": prompt, "responses": [f"r{number}" for number in range(len(scores))], "scores": list(scores)}


def test_equal_scores_make_no_pair_and_keep_their_order_in_a_list():
    row = ranked(1, 3, 3, 1)
    _, found = source_of(row, wanted="pairs", lists="all_pairs")
    assert pairs_of(found) == [("r1", "r0", 2), ("r1", "r3", 2), ("r2", "r0", 2), ("r2", "r3", 2)]
    _, found = source_of(row, wanted="pairs")
    assert pairs_of(found) == [("r1", "r3", 2)]
    _, found = source_of(row, wanted="lists")
    assert [(one.chosen, one.score) for one in found] == [("r1", 3), ("r2", 3), ("r0", 1), ("r3", 1)]


@pytest.mark.parametrize("wanted", ["pairs", "lists"])
@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        (ranked(2, 2, 2), "equal_scores", "all 3 responses have the score 2"),
        (ranked(2), "fewer_than_two_responses", "1 in the row"),
        (ranked(2, None, "N/A"), "fewer_than_two_responses", "no_score response 2 of 3 has no number"),
        (ranked(2, float("nan")), "fewer_than_two_responses", "no_score response 2 of 2"),
        (ranked(2, 1) | {"scores": [1]}, "scores_do_not_match", "2 responses and 1 scores"),
        (ranked(2, 1) | {"responses": ["a", 3]}, "fewer_than_two_responses", "wrong_type response 2 of 2 is int"),
        (ranked(2, 1) | {"responses": ["a", "a"]}, "fewer_than_two_responses", "identical_responses response 2 of 2"),
        (ranked(2, 1) | {"responses": ["a", " "]}, "fewer_than_two_responses", "empty_response response 2 of 2"),
        (ranked(2, 1) | {"responses": "a"}, "missing_field", "a list of responses"),
        (ranked(2, 1, prompt=3), "wrong_type", "response 1 of 2: prompt is int, expected text"),
    ],
)
def test_a_row_of_which_nothing_is_ranked_has_its_reason(row, reason, detail, wanted):
    _, found = source_of(ranked(1, 2), row, ranked(3, 2), wanted=wanted)
    assert {one.row for one in found if not isinstance(one, Dropped)} == {0, 2}
    (found,) = (one for one in found if one.row == 1)
    assert found.reason == reason
    assert detail in found.detail


def test_what_is_left_out_of_a_list_is_told_and_the_rest_is_read():
    row = ranked(1, None, 3, 3) | {"responses": ["a", "b", "c", "c"]}
    for wanted, kept in (("lists", ["c", "a"]), ("pairs", ["c"])):
        _, found = source_of(row, wanted=wanted)
        assert [one.chosen for one in found[: len(kept)]] == kept
        assert [(one.row, one.reason) for one in found[len(kept) :]] == [(0, "no_score"), (0, "identical_responses")]


def test_names_that_are_not_known_are_given_and_what_nothing_reads_is_named():
    row = {"question": "Hi?", "texts": TEXTS, "stars": NUMBERS, "models": ["x"]}
    columns = {"prompt": "question", "responses": "texts", "scores": "stars"}
    source, found = source_of(row, wanted="pairs", columns=columns)
    assert pairs_of(found) == [("best", "bad", 4)]
    assert source.unread == ["models"]
    feedback = FORMS["UltraFeedback"] | {"source": "x"}
    feedback["completions"] = [{**one, "model": "m", "annotations": {"a": 1}} for one in feedback["completions"]]
    source, _ = source_of(feedback, wanted="pairs")
    assert sorted(source.unread) == ["completions[].annotations", "completions[].model", "source"]


def test_lists_without_a_score_are_told():
    with pytest.raises(DataError, match="several responses a row"):
        source_of({"prompt": "a", "responses": ["b", "c"]}, wanted="pairs")


def test_a_setting_for_lists_is_not_set_in_vain():
    tokenizer = make_tiny_tokenizer()

    def said(*rows, wanted="pairs"):
        Path("d.jsonl").write_bytes(lines(*rows))
        data = DataConfig(path="d.jsonl", lists="all_pairs", eval_fraction=0)
        list(PairStream(data, tokenizer) if wanted == "pairs" else ResponseStream(data, tokenizer, wanted=wanted))

    said(ranked(1, 2))
    for rows, wanted, words in (
        ([GOOD], "pairs", "data.path names no ranked lists"),
        ([ranked(1, 2)], "lists", "learns from whole lists"),
        ([ranked(1, 2)], "responses", "best_worst, by which the best is good"),
    ):
        with pytest.raises(ConfigError, match=words):
            said(*rows, wanted=wanted)


def groups(*rows, tokenizer=None, **data):
    Path("d.jsonl").write_bytes(lines(*rows))
    found = ResponseStream(
        DataConfig(path="d.jsonl", **{"eval_fraction": 0, **data}), tokenizer or make_tiny_tokenizer(), wanted="lists"
    )
    items = list(found)
    by_group = {}
    for item in items:
        if not isinstance(item, Dropped):
            by_group.setdefault(item.group_id, []).append(item.preference.chosen)
    return list(by_group.values()), [item for item in items if isinstance(item, Dropped)], found


def test_groups_are_lists_and_pairs_are_lists_of_two():
    Path("p.jsonl").write_bytes(lines(GOOD))
    found, dropped, stream = groups(ranked(1, 2, 3), ranked(1, 2, 3), ranked(3, 2, 1))
    assert found == [["r2", "r1", "r0"], ["r0", "r1", "r2"]]
    assert [one.reason for one in dropped] == ["duplicate"]
    assert stream.given == 7
    found, _, _ = groups(GOOD)
    assert found == [["Hello.", "Go away."]]
    _, found = source_of(GOOD, wanted="lists")
    assert [(one.chosen, one.score) for one in found] == [("Hello.", -1), ("Go away.", -2)]


def test_a_response_that_is_too_long_leaves_the_list_and_one_alone_is_no_list():
    row = ranked(1, 2, 3) | {"responses": ["a", "b" * 200, "c"]}
    found, (one,), _ = groups(row, max_length=60)
    assert found == [["c", "a"]]
    assert (one.row, one.reason) == (0, "too_long")
    assert one.detail.startswith("response 2, from the best: ")
    found, (one,), stream = groups(row | {"responses": ["a", "b" * 200, "c" * 200]}, ranked(1, 2), max_length=60)
    assert (one.row, one.reason) == (0, "fewer_than_two_responses")
    assert one.detail.count("too_long") == 2
    assert stream.read == {"d.jsonl": 2}


def test_a_list_whose_better_responses_are_too_long_says_nothing_more():
    row = ranked(5, 3, 3) | {"responses": ["b" * 200, "a", "c"]}
    found, (one,), stream = groups(row, ranked(1, 2), max_length=60)
    assert found == [["r1", "r0"]]
    assert (one.row, one.reason) == (0, "equal_scores")
    assert one.detail.startswith("the 2 responses that are left have one score (too_long response 1, from the best: ")
    assert stream.read == {"d.jsonl": 2}


def test_a_list_shares_its_prompt_and_its_held_out_prompts():
    Path("e.jsonl").write_bytes(lines(ranked(1, 2, prompt="Who?")))
    found, dropped, _ = groups(ranked(1, 2, prompt="Who?"), ranked(3, 2), eval_path="e.jsonl")
    assert len(found) == 2
    assert [(one.reason, one.row) for one in dropped] == [("prompt_is_held_out", 0)]


def test_tools_and_calls_reach_the_token_ids_or_are_told():
    tokenizer = make_tiny_tokenizer()
    asked = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    row = {"prompt": [USER], "responses": [[ANSWER], [asked]], "scores": [1, 2], "tools": [TOOL]}
    found, (one,), _ = groups(row, tokenizer=tokenizer)
    assert (found, one.reason, one.row) == ([], "tools_not_rendered", 0)
    tokenizer.chat_template = TOOL_TEMPLATE
    Path("d.jsonl").write_bytes(lines(row))
    data = DataConfig(path="d.jsonl", eval_fraction=0)
    best, other = ResponseStream(data, tokenizer, wanted="lists")
    assert '"zone": "UTC"' in tokenizer.decode(best.response_ids)
    assert '"parameters"' in tokenizer.decode(other.prompt_ids)
    (pair,) = PairStream(data, tokenizer)
    assert '"zone": "UTC"' in tokenizer.decode(pair.chosen_ids)
    assert pair.preference.calls == {"chosen": [CALL]}


MARGINS = {
    "margin": ({"margin": 2}, 2.0),
    "margin of CSV": ({"margin": "0.5"}, 0.5),
    "chosen_score": ({"chosen_score": 3, "rejected_score": 1}, 2.0),
    "score_chosen": ({"score_chosen": 3.5, "score_rejected": 4}, -0.5),
    "chosen-rating": ({"chosen-rating": 5, "rejected-rating": 4}, 1.0),
    "margin first": ({"margin": 1, "score_chosen": 5, "score_rejected": 1}, 1.0),
    "one score alone": ({"chosen_score": 3}, None),
    "no number": ({"margin": "large"}, None),
    "not a number": ({"margin": float("nan")}, None),
    "a truth value": ({"margin": True}, None),
    "nothing": ({}, None),
}


@pytest.mark.parametrize("name", MARGINS)
def test_how_much_better_chosen_is_is_read(name):
    more, margin = MARGINS[name]
    source, (found,) = source_of({**GOOD, **more}, wanted="pairs")
    assert found.margin == margin
    unread = {"margin first": ["score_chosen", "score_rejected"]}.get(name, [] if margin is not None else sorted(more))
    assert sorted(source.unread) == unread


def test_a_ranked_file_that_is_broken_says_so():
    with pytest.raises(DataError, match="one of chosen and rejected"):
        source_of({"prompt": "a", "chosen": "b", "responses": ["c", "d"], "scores": [1, 2]}, wanted="pairs")
