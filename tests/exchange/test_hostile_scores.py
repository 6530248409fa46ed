"""Files of scores as people have them: every row is kept or dropped with a reason, and what speaks against a file is said."""

import json
import pickle
from pathlib import Path

import polars as pl
import pytest
import torch
from transformers import AutoTokenizer

from tests.conftest import experiment, make_tiny_model, preference_rows, refscore_here, write_rows

NAMES = ("chosen", "rejected")


def row(number=0, **changes):
    """A pair of token ids with sums."""
    return {
        "prompt_ids": [5, 6, number % 200],
        "chosen_ids": [7, 8, 9],
        "rejected_ids": [10, 11],
        "ref_chosen_logps": -4.5,
        "ref_rejected_logps": -2.25,
        **changes,
    }


@pytest.fixture
def where(tmp_path, tiny_model):
    """A directory with an experiment, whose data has none of the token ids below."""
    data = write_rows(tmp_path / "preferences.jsonl", preference_rows(6))
    experiment(tmp_path, tiny_model, data, reference={"dtype": "float32"})
    return tmp_path


def imported(where, data, *options, by="Lab A", code=0):
    named = ["--by", by] if by is not None else []
    return refscore_here(where, "import", data, "--config", "experiment.yaml", *named, *options, code=code)


def shards(where):
    return list((where / "data/store").glob("*/scores-*.parquet"))


VALUES = {"ref_chosen_token_logps": [-1.5, -1.5, -1.5], "ref_rejected_token_logps": [-1.0, -1.25]}
DROPPED = {
    "with a score that is not finite": [
        row(ref_chosen_logps=float("nan")),
        row(ref_rejected_logps=float("-inf")),
        row(ref_chosen_logps=-(10**400)),
        row(**{**VALUES, "ref_chosen_token_logps": [-1.5, -1e300, -1.5]}),
    ],
    "with a score above 0, which is no log-probability": [
        row(ref_chosen_logps=0.5),
        row(ref_rejected_logps=1e-9),
        row(**{**VALUES, "ref_chosen_token_logps": [-5.0, 0.5, 0.0]}),
    ],
    "without a score": [
        row(ref_chosen_logps=None),
        {name: value for name, value in row().items() if name != "ref_rejected_logps"},
    ],
    "with a score that is no number": [
        row(ref_chosen_logps="-4.5"),
        row(ref_chosen_logps=True),
        row(ref_chosen_logps=[-4.5]),
        row(**{**VALUES, "ref_chosen_token_logps": [-1.5, "-1.5", -1.5]}),
    ],
    "without token ids of prompt or response": [
        row(prompt_ids=[]),
        row(chosen_ids=[]),
        row(rejected_ids=None),
        row(rejected_ids="10 11"),
        {name: value for name, value in row().items() if name != "chosen_ids"},
    ],
    "with token ids that are no whole numbers": [
        row(prompt_ids=[5.0, 6.0]),
        row(chosen_ids=["7", "8"]),
        row(rejected_ids=[True, False]),
        row(prompt_ids=[5, None]),
        row(prompt_ids=[[5, 6]]),
    ],
    "with another number of values than tokens": [
        row(**{**VALUES, "ref_chosen_token_logps": [-4.5]}),
        row(**{**VALUES, "ref_rejected_token_logps": []}),
        row(**{**VALUES, "ref_rejected_token_logps": "none"}),
    ],
    "with a sum that is not that of its values per token": [row(**VALUES, ref_chosen_logps=-9.0)],
}


@pytest.mark.parametrize("reason", DROPPED)
def test_a_row_that_cannot_be_true_is_dropped_with_its_reason(where, reason):
    bad = DROPPED[reason]
    data = write_rows(where / "scores.jsonl", [row(1), *bad, row(2, **VALUES)])
    said = imported(where, data)
    assert f"rows      {2 + len(bad)} read, 2 kept" in said
    assert f"dropped   {len(bad)} {reason} (first: {data} row 1)" in said
    assert "sequences 4 imported; in" in said


def test_where_no_row_is_left_nothing_is_imported(where):
    data = write_rows(where / "scores.jsonl", [row(ref_chosen_logps=0.5), row(ref_chosen_logps=None)])
    said = imported(where, data, code=3)
    assert "of 2 rows none can be imported: 1 with a score above 0" in said
    assert "1 without a score" in said
    assert not shards(where)


@pytest.mark.parametrize("token", [100_000, -1, 2**70])
def test_token_ids_of_another_vocabulary_are_refused(where, token):
    data = write_rows(where / "scores.jsonl", [row(1), row(2, rejected_ids=[token, 5])])
    said = imported(where, data, code=3)
    assert f"row 1: token id {token} is not in the reference's vocabulary" in said
    assert "reference.model" in said
    assert not shards(where)


def test_two_scores_of_one_response_are_refused_and_named(where):
    data = write_rows(where / "scores.jsonl", [row(1), row(2), row(1, ref_rejected_logps=-2.26, rejected_ids=[10, 11])])
    said = imported(where, data, code=3)
    assert f"{data} row 0 rejected and {data} row 2 rejected are the same response" in said
    assert "-2.2500 and -2.2600" in said
    assert "Nothing was imported" in said
    assert not shards(where)


def test_the_same_response_on_both_sides_is_one(where):
    """A response that wins in one pair and loses in another; noise of arithmetic apart, the first sum is kept."""
    data = write_rows(
        where / "scores.jsonl",
        [row(1), row(1, chosen_ids=[10, 11], ref_chosen_logps=-2.2505, rejected_ids=[12], ref_rejected_logps=-1)],
    )
    assert "sequences 3 imported, 1 that stand in another row too" in imported(where, data)
    sums = pl.concat([pl.read_parquet(shard) for shard in shards(where)])["logp"].to_list()
    assert sorted(sums) == [-4.5, -2.25, -1.0]


@pytest.mark.parametrize(("apart", "code"), [(0.15, 0), (0.5, 3)])
def test_a_dtype_that_is_not_known_may_be_coarse(where, apart, code):
    data = write_rows(where / "scores.jsonl", [row(1), row(1, ref_chosen_logps=-4.5 - apart)])
    said = imported(where, data, "--set", "reference.dtype=auto", code=code)
    assert ("2 that stand in another row too" in said) == (code == 0)
    assert "further apart than arithmetic in this dtype" in imported(where, data, code=3)


def test_two_rows_of_different_files_contradict_one_another_too(where):
    for number, score in enumerate((-4.5, -4.6)):
        write_rows(where / f"scores/part{number}.jsonl", [row(3, ref_chosen_logps=score)])
    said = imported(where, "scores", code=3)
    assert "part0.jsonl row 0 chosen and " in said
    assert "part1.jsonl row 0 chosen" in said


def test_what_was_imported_before_is_not_contradicted(where):
    imported(where, write_rows(where / "first.jsonl", [row(1), row(2)]))
    data = write_rows(where / "second.jsonl", [row(3), row(2, ref_chosen_logps=-4.6)])
    said = imported(where, data, code=3)
    assert f"{data} row 1 chosen has the score -4.6000, and -4.5000 nats were imported" in said
    assert "another name" in said
    assert len(shards(where)) == 1
    imported(where, data, by="Lab B")
    # within noise it is the same
    data = write_rows(where / "third.jsonl", [row(3), row(2, ref_chosen_logps=-4.501)])
    assert "2 imported, 2 that were imported before" in imported(where, data)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no row"),
        ("[1, 2", "line 1"),
        ('{"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}\n', "those of no form that is read"),
        (json.dumps(row()) + "\n{", "line 2"),
    ],
)
def test_a_file_that_is_no_such_file(where, content, said):
    (where / "scores.jsonl").write_text(content)
    assert said in imported(where, where / "scores.jsonl", code=3)
    assert not shards(where)


def test_places_that_hold_nothing(where):
    assert "no such file or directory" in imported(where, "none.jsonl", code=3)
    assert "no such file or directory" in imported(where, "none", "--format", "open_instruct", code=3)
    (where / "empty").mkdir()
    assert "holds no file of scored pairs" in imported(where, "empty", code=3)
    write_rows(where / "mixed/scores.jsonl", [row()])
    (where / "mixed/more.npz").write_text("")
    assert "also holds more.npz, which is not read" in imported(where, "mixed", code=3)
    (where / "scores.txt").write_text("-4.5")
    assert "files ending in" in imported(where, "scores.txt", code=3)


def test_a_form_that_is_not_that_of_the_file(where):
    data = write_rows(where / "scores.jsonl", [row()])
    assert "--format 'tlr' is unknown; there are: trl, jsonl" in imported(where, data, "--format", "tlr", code=2)
    assert "without the texts src" in imported(where, data, "--format", "fairseq2", code=3)
    assert "has no cache beside it" in imported(where, data, "--format", "open_instruct", code=3)
    texts = write_rows(where / "texts.jsonl", [fairseq2_row()])
    assert "has no column chosen_ids, prompt_ids, rejected_ids" in imported(where, texts, "--format", "trl", code=3)


@pytest.mark.parametrize("name", ["", " ", "Lab\nA", " Lab A", "x" * 101, "a\x1b[31m"])
def test_a_name_that_is_none(where, name):
    data = write_rows(where / "scores.jsonl", [row()])
    said = imported(where, data, by=name, code=2)
    assert "reference.imported_by" in said
    assert "--by" in said
    assert "\x1b" not in said
    assert not shards(where)


def test_who_it_was_must_be_said_once(where):
    data = write_rows(where / "scores.jsonl", [row()])
    assert "--by NAME is missing" in imported(where, data, by=None, code=2)
    whose = ["--set", "reference.engine=imported", "--set", "reference.imported_by=Lab B"]
    assert "leave one away" in imported(where, data, *whose, code=2)
    assert "imported by Lab B" in imported(where, data, *whose, by=None)
    said = refscore_here(where, "precompute", "--config", "experiment.yaml", *whose[2:], code=2)
    assert "reference.imported_by is read with reference.engine=imported only" in said
    said = refscore_here(where, "precompute", "--config", "experiment.yaml", *whose[:2], code=2)
    assert "reference.engine=imported needs reference.imported_by" in said


def test_what_the_scores_cover_is_said(where):
    data = write_rows(where / "scores.jsonl", [row()])
    said = imported(where, data)
    assert "covered   0 of 12 sequences" in said
    assert "warning   none of them: the scores are of other data" in said
    # the data need not be at hand
    said = imported(where, data, "--set", "data.path=gone.jsonl")
    assert "not compared with the data of this configuration: gone.jsonl: no such file" in said
    assert "not compared" in imported(where, data, "--set", "data.path=-")


def test_a_store_that_cannot_be_written_is_said_before_the_rows_are_read(where):
    (where / "full").write_text("a file")
    data = write_rows(where / "scores.jsonl", [row(ref_chosen_logps=0.5)])
    assert "the store cannot be written" in imported(where, data, "--set", "reference.store=full", code=1)


def fairseq2_row(**changes):
    return {
        "src": "the cat", "tgt_chosen": " sat on", "tgt_rejected": " ran", "reference_score_chosen": -4.5,
        "reference_score_rejected": -2.25, **changes,
    }  # fmt: skip


def test_rows_of_fairseq2(where):
    data = write_rows(
        where / "scores.jsonl",
        [
            fairseq2_row(),
            fairseq2_row(reference_score_chosen=0.0),
            fairseq2_row(reference_score_rejected=None),
            fairseq2_row(src=["the cat"]),
            fairseq2_row(tgt_chosen=None),
        ],
    )
    said = imported(where, data)
    assert "the form fairseq2" in said
    assert "5 read, 1 kept" in said
    assert "1 with a score of exactly 0" in said
    assert "1 without a score" in said
    assert "2 without the texts src, tgt_chosen and tgt_rejected" in said


def test_prompts_of_fairseq2_begin_as_those_of_the_experiment(tmp_path):
    """Its texts hold no begin token: the experiment's own prompts say whether there is one."""
    model = make_tiny_model(tmp_path / "model", bos_token_id=2)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.bos_token = "<|assistant|>"
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    tokenizer.save_pretrained(model)
    data = write_rows(tmp_path / "preferences.jsonl", preference_rows(12))
    config = experiment(tmp_path, model, data)
    refscore_here(tmp_path, "precompute", "--config", config, "--run", "r")
    refscore_here(tmp_path, "export", "--run", "r", "--format", "fairseq2", "--to", "out")
    first = json.loads((tmp_path / "out/train.jsonl").open().readline())
    assert not first["src"].startswith("<|assistant|>")
    assert "covered   24 of 24 sequences" in imported(tmp_path, "out")


def open_instruct_row(index=0, **changes):
    return {
        "chosen_input_ids": [5, 6, 7, 8], "chosen_labels": [-100, -100, 7, 8], "chosen_attention_mask": [1] * 4,
        "rejected_input_ids": [5, 6, 9], "rejected_labels": [-100, -100, 9], "rejected_attention_mask": [1] * 3,
        "index": index, **changes,
    }  # fmt: skip


def open_instruct(where, rows, cache):
    """A table with this cache beside it: numbers, or bytes."""
    (where / "oi").mkdir()
    pl.DataFrame(rows).write_parquet(where / "oi/train.parquet")
    file = where / "oi/train_reference_logprobs.pt"
    if isinstance(cache, bytes):
        file.write_bytes(cache)
    else:
        torch.save(cache, file)
    return where / "oi"


def test_rows_of_open_instruct_are_looked_up_by_their_index(where):
    rows = [
        open_instruct_row(1),
        open_instruct_row(0, chosen_input_ids=[5, 6, 3, 4], chosen_labels=[-100, -100, 3, 4]),
        open_instruct_row(2, chosen_labels=[-100, -100, 7, -100]),
        open_instruct_row(3, rejected_attention_mask=[0, 1, 1]),
        open_instruct_row(1),
        open_instruct_row(9),
        open_instruct_row(6, chosen_labels=[-100] * 4),
        open_instruct_row(7, chosen_labels=[-100, 7, 8]),
    ]
    cache = {f"{name}_logps": torch.tensor([-1.0, -2, -3, -4, -5, -6, -7, -8]) for name in NAMES}
    cache["rejected_logps"][0] = -2.0
    said = imported(where, open_instruct(where, rows, cache))
    assert "8 read, 2 kept" in said
    for reason in (
        "1 of which a part of the response was not scored",
        "1 that are padded",
        "1 with the index of another row",
        "1 with an index that is none of the cache's",
        "1 without token ids of prompt or response",
        "1 with other labels than token ids",
    ):
        assert f"dropped   {reason}" in said
    sums = pl.concat([pl.read_parquet(shard) for shard in shards(where)])["logp"].to_list()
    assert sorted(sums) == [-2.0, -2.0, -1.0]
    assert "3 imported, 1 that stand in another row too" in said


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("harmed"),)


@pytest.mark.parametrize(
    ("cache", "said"),
    [
        ({f"{name}_logps": torch.zeros(3) for name in NAMES}, "has 3 entries and"),
        ({"chosen_logps": torch.zeros(1)}, "is no cache of open-instruct's"),
        ({"chosen_logps": torch.zeros(1), "rejected_logps": torch.zeros(1, 1)}, "two lists of the same length"),
        ({"chosen_logps": torch.zeros(1), "rejected_logps": torch.zeros(2)}, "two lists of the same length"),
        ({"chosen_logps": [-1.0], "rejected_logps": [-1.0]}, "is no cache of open-instruct's"),
        ({name: Harmful() for name in NAMES}, "is no cache of open-instruct's"),
        (pickle.dumps(Harmful()), "is no cache of open-instruct's"),
        (b"", "is no cache of open-instruct's"),
        (b"PK\x03\x04" + b"\0" * 100, "is no cache of open-instruct's"),
        (torch.zeros(3), "is no cache of open-instruct's"),
    ],
)
def test_a_cache_of_other_rows_or_none_at_all(where, cache, said, monkeypatch):
    monkeypatch.chdir(where)
    assert said in imported(where, open_instruct(where, [open_instruct_row()], cache), code=3)
    assert not (where / "harmed").exists()
    assert not shards(where)


def test_a_table_without_its_cache_says_what_it_is_called(where):
    directory = open_instruct(where, [open_instruct_row()], {f"{name}_logps": torch.zeros(1) for name in NAMES})
    (directory / "train_reference_logprobs.pt").rename(directory / "0a1b2c.pt")
    said = imported(where, directory, "--format", "open_instruct", code=3)
    assert "must lie there as train_reference_logprobs.pt (sums)" in said
    assert "which is not read" in imported(where, directory, code=3)
    assert "must lie there as train_reference_logprobs.pt" in imported(where, directory / "train.parquet", code=3)
