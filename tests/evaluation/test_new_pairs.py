"""New pairs by hand: who meets whom, what is left out and why, what a row says."""

import pytest

from pipeline.engines.vllm.generator import Sample
from pipeline.evaluation.new_pairs import make_pairs, pair_row, score_samples
from pipeline.evaluation.next_round import _held_out_row
from pipeline.judges.judging import Judge, Prompt, by_reward
from pipeline.rollouts.prompts import TrainingPrompt, training_prompts
from tests.conftest import make_tiny_tokenizer
from tests.pairs.inputs import CALL, TOOL, TOOL_TEMPLATE
from tests.pairs.pair_rows import build, row


def request(messages=None):
    return TrainingPrompt(
        Prompt("p", "How do I boil rice?", "cooking", [1, 2]),
        messages or [{"role": "user", "content": "How do I boil rice?"}],
    )


def samples(*texts, cut=()):
    return [Sample(text, [1], "length" if at in cut else "stop") for at, text in enumerate(texts)]


LENGTH = by_reward("rule:length", lambda items: [float(len(item.response.text)) for item in items])


def test_the_highest_reward_meets_the_lowest():
    (made,), reasons = make_pairs(LENGTH, [request()], [samples("aa", "aaaa", "a")], 1)
    assert (made.choice.chosen, made.choice.rejected, made.choice.margin) == (1, 2, 3)
    assert reasons == {}


@pytest.mark.parametrize(
    ("written", "margin", "reason"),
    [
        (samples("aa", "a"), 2, "near_tie"),
        (samples("aa", "a", cut=[0]), 1, "best_is_cut_off"),
        (samples("aa", ""), 1, "worst_is_empty"),
        (samples("no", "n"), 1, "best_is_refused"),
    ],
)
def test_what_is_left_out_is_counted_with_its_reason(written, margin, reason):
    made, reasons = make_pairs(LENGTH, [request()], [written], margin, accept=lambda best: best.text != "no")
    assert (made, reasons) == ([], {reason: 1})


def test_of_responses_of_a_fixed_length_none_has_ended_and_the_rows_say_so():
    (made,), reasons = make_pairs(LENGTH, [request()], [samples("aa", "a", cut=[0, 1])], 1, must_end=False)
    row = pair_row(made, {})
    assert (reasons, row["chosen_cut_off"], row["rejected_cut_off"]) == ({}, True, True)


def test_the_white_space_that_a_continuation_begins_with_is_in_the_row_and_not_judged():
    """In plain text the row's response is put right behind its prompt."""
    (made,), _ = make_pairs(LENGTH, [request()], [samples(" aa", "  a")], 1)
    row = pair_row(made, {})
    assert (row["chosen"], row["rejected"]) == (" aa", "  a")
    assert made.scores == [2.0, 1.0]


def test_a_row_says_which_side_was_cut_off():
    (made,), _ = make_pairs(LENGTH, [request()], [samples("aa", "a", cut=[1])], 1)
    row = pair_row(made, {})
    assert row["rejected_cut_off"]
    assert "chosen_cut_off" not in row


def test_a_judge_that_failed_makes_no_pair():
    judge = by_reward("j", lambda items: [None for _ in items])
    assert make_pairs(judge, [request()], [samples("a", "b")], 0)[1] == {"judge_failed": 1}


def test_a_judge_of_duels_plays_every_two_in_both_orders():
    met = []

    def prefer(duels):
        met.extend((duel.first.text, duel.second.text) for duel in duels)
        # likes what is longer, and a little what comes first
        return [0.6 if len(duel.first.text) >= len(duel.second.text) else 0.0 for duel in duels]

    (scores,) = score_samples(Judge("j", prefer), [request()], [samples("a", "bb", "ccc")])
    assert sorted(met) == sorted((a, b) for a in ("a", "bb", "ccc") for b in ("a", "bb", "ccc") if a != b)
    # the longest: 0.6 as first, 1 - 0 as second, twice each
    assert scores == pytest.approx([0.2, 0.5, 0.8])


def test_a_row_is_preference_data_with_its_provenance():
    (made,), _ = make_pairs(LENGTH, [request()], [samples("Boil it.", "No.")], 1)
    row = pair_row(made, {"run": "r", "judge": "rule:length"})
    assert (row["prompt"], row["chosen"], row["rejected"], row["topic"]) == (
        "How do I boil rice?",
        "Boil it.",
        "No.",
        "cooking",
    )
    assert row["provenance"] == {
        "run": "r", "judge": "rule:length", "chosen_score": 8.0, "rejected_score": 3.0, "chosen_sample": 0, "rejected_sample": 1,
    }  # fmt: skip


def test_a_conversation_stays_one():
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rice?"}]
    (made,), _ = make_pairs(LENGTH, [request(turns)], [samples("Boil it.", "No.")], 1)
    row = pair_row(made, {})
    assert row["prompt"] == turns
    assert row["chosen"] == [{"role": "assistant", "content": "Boil it."}]


def test_held_out_pairs_keep_what_was_cut_off(tmp_path):
    (pair,) = build(tmp_path, make_tiny_tokenizer(), [row(rejected_cut_off=True)], eval_fraction=0).pairs
    again = _held_out_row(pair)
    assert again["rejected_cut_off"]
    assert "chosen_cut_off" not in again


def test_tools_and_their_calls_reach_the_next_round(tmp_path):
    """Held-out rows and new pairs are read back as what they were: the same token ids."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    prompt = [{"role": "user", "content": "When?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    prompt.append({"role": "tool", "content": "12:00", "tool_call_id": "1"})
    sides = {
        "chosen": [{"role": "assistant", "content": "Noon."}],
        "rejected": [{"role": "assistant", "tool_calls": [CALL]}],
    }
    (pair,) = build(tmp_path, tokenizer, [{"prompt": prompt, "tools": [TOOL], **sides}], eval_fraction=0).pairs
    (again,) = build(tmp_path, tokenizer, [_held_out_row(pair)], eval_fraction=0).pairs
    assert again == pair
    (asked,) = training_prompts([pair])
    (made,), _ = make_pairs(LENGTH, [asked], [samples("aa", "a")], 1)
    (new,) = build(tmp_path, tokenizer, [pair_row(made, {})], eval_fraction=0).pairs
    assert new.prompt_ids == pair.prompt_ids
