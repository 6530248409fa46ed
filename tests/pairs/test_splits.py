"""Pairs: split by prompt, identities, no pair twice, and what is said of what is left out."""

import hashlib
import struct

import pytest

from pipeline.config.experiment import DataConfig
from pipeline.errors import DataError
from pipeline.pairs.preferences import Dropped
from pipeline.pairs.splits import PairStream, count_reasons, prompt_id_of, prompt_text, source_digests
from tests.conftest import make_tiny_tokenizer, preference_rows, write_rows
from tests.pairs.pair_rows import build, row


@pytest.fixture(scope="module")
def tokenizer():
    return make_tiny_tokenizer()


def test_the_split_is_by_prompt_and_does_not_move_when_rows_are_added(tmp_path, tokenizer):
    rows = [row(f"Question {n // 2}?", f"Good {n}.", f"Bad {n}.") for n in range(80)]
    before = build(tmp_path, tokenizer, rows, eval_fraction=0.3)
    sides = {}
    for pair in before.pairs:
        sides.setdefault(tuple(pair.prompt_ids), set()).add(pair.split)
    assert all(len(side) == 1 for side in sides.values())
    assert {"train", "eval"} == set().union(*sides.values())
    shares = sum(1 for pair in before.pairs if pair.split == "eval") / 80
    assert 0.15 < shares < 0.45
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
    assert found.dropped == [Dropped(str(tmp_path / "d.jsonl"), 0, "prompt_is_held_out", f"also in {held_out}")]
    assert found.formats.keys() == found.digests.keys() == {str(held_out), str(tmp_path / "d.jsonl")}
    data = DataConfig(path=str(tmp_path / "d.jsonl"), eval_path=str(held_out))
    assert source_digests(data) == found.digests
    (tmp_path / "d.jsonl").unlink()
    assert source_digests(data) == {**found.digests, str(tmp_path / "d.jsonl"): None}
    assert source_digests(DataConfig(path=str(held_out))) == {str(held_out): found.digests[str(held_out)]}


def test_pair_ids_depend_on_tokens_and_split_rule_only(tmp_path, tokenizer):
    rows = preference_rows(6)
    first = [pair.pair_id for pair in build(tmp_path, tokenizer, rows, eval_fraction=0).pairs]
    turned = [pair.pair_id for pair in build(tmp_path, tokenizer, rows[::-1], eval_fraction=0).pairs]
    assert first == turned[::-1]
    other = [pair.pair_id for pair in build(tmp_path, tokenizer, rows, eval_fraction=0.01).pairs]
    held_out = str(write_rows(tmp_path / "e.jsonl", [row()]))
    third = [pair.pair_id for pair in build(tmp_path, tokenizer, rows, eval_path=held_out).pairs]
    assert not set(first) & set(other)
    assert not set(first + other) & set(third)
    # what a fraction would say is not read then
    fourth = build(tmp_path, tokenizer, rows, eval_path=held_out, eval_fraction=0.3).pairs
    assert third == [pair.pair_id for pair in fourth]


def test_identities_are_what_they_were_when_runs_were_made(tmp_path, tokenizer):
    """Written down: a change makes every pair another one, and moves pairs between the splits."""
    (pair,) = build(tmp_path, tokenizer, [row()], eval_fraction=0).pairs
    held_out = str(write_rows(tmp_path / "e.jsonl", [row("Another?")]))
    state = hashlib.sha256(b"refscore-pair\x01")
    for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
        state.update(struct.pack("<Q", len(ids)) + struct.pack(f"<{len(ids)}i", *ids))
    for rule, ours in ((b"prompt-hash<0.0", {"eval_fraction": 0}), (b"eval_path", {"eval_path": held_out})):
        named = state.copy()
        named.update(rule)
        found = PairStream(DataConfig(path=str(tmp_path / "d.jsonl"), **ours), tokenizer)
        assert list(found)[-1].pair_id == named.hexdigest()[:32]
    prompt = hashlib.sha256(b"refscore-prompt" + struct.pack(f"<{len(pair.prompt_ids)}i", *pair.prompt_ids)).digest()
    assert prompt_id_of(pair.prompt_ids) == prompt.hex()[:16]
    # the first eight bytes of that, as a share of what they can hold
    share = struct.unpack(">Q", prompt[:8])[0] / 2**64
    for fraction, split in ((share * 0.999, "train"), (share * 1.001, "eval")):
        data = DataConfig(path=str(tmp_path / "d.jsonl"), eval_fraction=fraction)
        assert [one.split for one in PairStream(data, tokenizer)] == [split]


def test_a_prompt_is_shown_as_the_request_or_as_all_turns():
    system, user, answer = ({"role": role, "content": role[0]} for role in ("system", "user", "assistant"))
    assert prompt_text([user]) == "u"
    assert prompt_text([system, user]) == "system: s\n\nuser: u"
    assert prompt_text([user, answer, user]) == "user: u\n\nassistant: a\n\nuser: u"
    assert prompt_text([system]) == "system: s"


def test_a_repeated_pair_is_kept_once_and_said(tmp_path, tokenizer):
    found = build(tmp_path, tokenizer, [row(), row(), row("Other?")], eval_fraction=0)
    assert len(found.pairs) == 2
    detail = f"pair {found.pairs[0].pair_id[:12]} was read before"
    assert found.dropped == [Dropped(str(tmp_path / "d.jsonl"), 1, "duplicate", detail)]


def test_the_most_frequent_reason_comes_first():
    dropped = [Dropped("s", at, reason) for at, reason in enumerate(["a", "b", "b", "c", "c", "c"])]
    assert list(count_reasons(dropped).items()) == [("c", 3), ("b", 2), ("a", 1)]


def test_the_models_positions_reach_the_pairs(tmp_path, tokenizer):
    path = str(write_rows(tmp_path / "d.jsonl", [row()]))
    assert [one.reason for one in PairStream(DataConfig(path=path), tokenizer, 3)] == ["too_long"]


def test_nothing_left_is_an_error_with_the_reasons(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"\(1 x too_long; 1 x empty_response\)"):
        build(tmp_path, tokenizer, [row(), row(chosen=" ")], max_length=3)
    held_out = str(write_rows(tmp_path / "e.jsonl", [row()]))
    with pytest.raises(DataError, match=r"d\.jsonl \(1 x prompt_is_held_out\)"):
        build(tmp_path, tokenizer, [row()], eval_path=held_out)
    with pytest.raises(DataError, match=r"\(no rows\)"):
        build(tmp_path, tokenizer, [row()], eval_fraction=0.9999999)
