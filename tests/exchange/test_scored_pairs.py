"""The files hold what the loaders of other trainers read, all pairs or a count of those left out, and nothing of this machine."""

import json

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.artifacts.markdown import name_for_others
from pipeline.artifacts.runs import Run, read_saved_config
from pipeline.artifacts.schemas import PAIRS
from pipeline.artifacts.tables import read_table, write_table
from pipeline.config.files import load_overrides
from pipeline.errors import DataError, RefscoreError
from pipeline.exchange import scored_pairs
from pipeline.exchange.scored_pairs import write_fairseq2, write_jsonl, write_open_instruct, write_trl
from pipeline.training.save import model_card
from tests.conftest import experiment, make_tiny_tokenizer, preference_rows, refscore_here, write_rows
from tests.exchange.conftest import exported, pairs_of

SIDES = ("chosen", "rejected")


def test_open_instruct_finds_the_cache_of_the_rows_in_their_order(scored, tmp_path):
    """Read as TensorCache.from_disk and its loss read it: by index, labels shifted, -100 masked."""
    exported(scored, "open_instruct", tmp_path)
    for split, ours in (("train", "train"), ("test", "eval")):
        rows, pairs = pl.read_parquet(tmp_path / f"{split}.parquet"), pairs_of(scored, ours)
        assert rows["index"].to_list() == list(range(len(pairs)))
        sums, means = (
            torch.load(tmp_path / f"{split}_reference_logprobs{of}.pt", weights_only=True) for of in ("", "_average")
        )
        assert set(sums) == set(means) == {"chosen_logps", "rejected_logps"}
        for row, pair in zip(rows.iter_rows(named=True), pairs.iter_rows(named=True), strict=True):
            for side in SIDES:
                ids, labels = row[f"{side}_input_ids"], row[f"{side}_labels"]
                assert ids == pair["prompt_ids"] + pair[f"{side}_ids"]
                assert row[f"{side}_attention_mask"] == [1] * len(ids)
                assert [token for token in labels[1:] if token != -100] == pair[f"{side}_ids"]
                at = torch.tensor([row["index"]])
                logp = sums[f"{side}_logps"][at.long()].item()
                assert logp == pytest.approx(pair[f"ref_{side}_logps"], rel=1e-6)
                assert means[f"{side}_logps"][at].item() == pytest.approx(logp / len(pair[f"{side}_ids"]), rel=1e-6)
        assert sums["chosen_logps"].dtype == torch.float32


def test_fairseq2_tokenises_what_was_scored(scored, tmp_path):
    """Its loader encodes src and the targets and puts an end after these."""
    exported(scored, "fairseq2", tmp_path)
    tokenizer = make_tiny_tokenizer()
    for split, ours in (("train", "train"), ("test", "eval")):
        rows = [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        pairs = pairs_of(scored, ours)
        assert [row["id"] for row in rows] == pairs["pair_id"].to_list()
        for row, pair in zip(rows, pairs.iter_rows(named=True), strict=True):
            assert tokenizer(row["src"])["input_ids"] == pair["prompt_ids"]
            for side in SIDES:
                assert [*tokenizer(row[f"tgt_{side}"])["input_ids"], tokenizer.eos_token_id] == pair[f"{side}_ids"]
                assert row[f"reference_score_{side}"] == pair[f"ref_{side}_logps"]


def test_what_fairseq2_would_read_otherwise_is_left_out_and_counted(scored, tmp_path):
    """A response without an end gets one there, whose score is in no sum."""
    table = read_table(scored / "data/runs/r/pairs.parquet", PAIRS)
    rows = table.to_pylist()
    rows[0]["chosen_ids"] = rows[0]["chosen_ids"][:-1]
    rows[1]["ref_rejected_logps"] = 0.0
    # letters of a word that is one token
    rows[2]["prompt_ids"] = [*rows[2]["prompt_ids"], *make_tiny_tokenizer().convert_tokens_to_ids(list("rice"))]
    write_table(tmp_path / "pairs.parquet", pa.Table.from_pylist(rows, schema=PAIRS), {"scored": True})
    found = write_fairseq2(tmp_path / "pairs.parquet", tmp_path / "out", make_tiny_tokenizer())
    assert sum(found.pairs.values()) + sum(found.left_out.values()) == len(rows)
    assert found.left_out == {
        "pairs with a response that its end token does not end": 1,
        "pairs with a score of exactly 0, which is read as none": 1,
        "prompts whose text gives other tokens": 1,
    }


def test_plain_lines_hold_tokens_and_sums(scored, tmp_path):
    said = exported(scored, "jsonl", tmp_path)
    pairs = pairs_of(scored, "train")
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(rows) == len(pairs)
    assert f"pairs     {len(pairs)} train, {len(pairs_of(scored, 'eval'))} eval" in said
    for row, pair in zip(rows, pairs.iter_rows(named=True), strict=True):
        assert row == {name: value for name, value in pair.items() if name != "split"}


def test_the_card_says_what_scored_the_pairs(scored, for_trl):
    about = json.loads((scored / "data/runs/r/provenance.json").read_text())
    card = (for_trl / "README.md").read_text()
    assert about["reference_id"] in card
    assert "float32" in card


def test_pairs_without_scores_are_no_export(tiny_model, tmp_path):
    data = write_rows(tmp_path / "preferences.jsonl", preference_rows(8))
    config = experiment(tmp_path, tiny_model, data, train={"loss_type": "simpo"})
    refscore_here(tmp_path, "precompute", "--config", config, "--run", "r")
    for format_name in ("trl", "open_instruct", "jsonl", "fairseq2"):
        said = refscore_here(tmp_path, "export", "--run", "r", "--format", format_name, "--to", "out", code=2)
        assert "holds no scores" in said
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", ["damaged", "format 1"])
def test_pairs_that_cannot_be_read_leave_no_directory(scored, tmp_path, bad):
    pairs = tmp_path / "pairs.parquet"
    table = read_table(scored / "data/runs/r/pairs.parquet", PAIRS)
    if bad == "damaged":
        write_table(pairs, table)
        pairs.write_bytes(pairs.read_bytes()[: pairs.stat().st_size // 2])
    else:
        pq.write_table(table.replace_schema_metadata({b"refscore_format": b"1"}), pairs)
    for write in (write_trl, write_open_instruct, write_jsonl):
        with pytest.raises(DataError):
            write(pairs, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(DataError):
        write_fairseq2(pairs, tmp_path / "out", make_tiny_tokenizer())
    assert not (tmp_path / "out").exists()


def test_pairs_of_which_none_can_be_written_leave_no_directory(scored, tmp_path):
    rows = read_table(scored / "data/runs/r/pairs.parquet", PAIRS).to_pylist()
    rows = [{**row, "ref_chosen_logps": 0.0} for row in rows]
    write_table(tmp_path / "pairs.parquet", pa.Table.from_pylist(rows, schema=PAIRS), {"scored": True})
    with pytest.raises(DataError, match="no pair can be written"):
        write_fairseq2(tmp_path / "pairs.parquet", tmp_path / "out", make_tiny_tokenizer())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("failing", ["train.parquet", "test.parquet"])
def test_a_file_that_cannot_be_closed_takes_the_others_with_it(scored, tmp_path, monkeypatch, failing):
    class Failing(pq.ParquetWriter):
        def __init__(self, path, *given, **named):
            super().__init__(path, *given, **named)
            self.fails = path.name.endswith(failing)

        def close(self):
            super().close()
            if self.fails:
                raise OSError(28, "No space left on device")

    monkeypatch.setattr(scored_pairs.pq, "ParquetWriter", Failing)
    for write in (write_trl, write_open_instruct):
        with pytest.raises(RefscoreError, match="no space left"):
            write(scored / "data/runs/r/pairs.parquet", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(RefscoreError, match="no space left"):
        write_trl(scored / "data/runs/r/pairs.parquet", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_what_no_export_wrote_is_not_written_over(scored, tmp_path):
    """Neither a README.md, nor data that has the name of ours."""
    for name, text in (("README.md", "my page"), ("train.jsonl", "my data")):
        to = tmp_path / name
        to.mkdir()
        (to / name).write_text(text)
        said = refscore_here(scored, "export", "--run", "r", "--format", "jsonl", "--to", to, code=2)
        assert f"holds {name} and no README.md that marks it as an export" in said
        assert [(file.name, file.read_text()) for file in to.iterdir()] == [(name, text)]
        assert "no directory" in refscore_here(
            scored, "export", "--run", "r", "--format", "jsonl", "--to", to / name, code=2
        )


def test_an_export_is_replaced_whole_by_one_of_the_same_format_only(scored, tmp_path):
    to = tmp_path / "out"
    exported(scored, "open_instruct", to)
    first = {file.name for file in to.iterdir()}
    (to / "train.jsonl").write_text("of an earlier export")
    (to / "notes.txt").write_text("mine")
    said = exported(scored, "open_instruct", to)
    assert f"removed   {to / 'train.jsonl'}, of an earlier export" in said
    assert {file.name for file in to.iterdir()} == {*first, "notes.txt"}
    for format_name in ("trl", "alpaca_eval"):
        said = refscore_here(scored, "export", "--run", "r", "--format", format_name, "--to", to, code=2)
        assert "holds an export for open_instruct" in said
    assert {file.name for file in to.iterdir()} == {*first, "notes.txt"}


def test_cards_that_may_be_published_hold_no_path_of_this_machine(scored, for_trl, tiny_model):
    config = load_overrides(read_saved_config(Run(scored / "data/runs/r")), [], "config")
    assert tiny_model.is_absolute()
    cards = (for_trl / "README.md").read_text(), model_card(config, "r", "0" * 64, 24, {})
    for card in cards:
        assert str(tiny_model.parent) not in card
        assert str(scored) not in card
        assert f"`{tiny_model.name}`" in card
    assert f'load_dataset("{for_trl.name}")' in cards[0]
    assert "base_model" not in cards[1]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/home/me/models/base", "base"), ("models/", "models"), ("~/base", "base"), ("../base", "base"),
        ("lab/model", "lab/model"), ("embedded:demo/train.jsonl", "embedded:demo/train.jsonl"), ("-", "-"),
        ("data/rows.jsonl", "rows.jsonl"), ("/home/me/rows/*.jsonl", "*.jsonl"), ("a/b/c", "c"), ("here/model", "model"),
    ],
)  # fmt: skip
def test_names_keep_what_others_can_use(tmp_path, monkeypatch, name, shown):
    (tmp_path / "here/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert name_for_others(name) == shown


def test_a_run_that_is_not_there_and_a_form_that_is_not_known(scored):
    assert "has no configuration" in refscore_here(scored, "export", "--run", "none", "--format", "trl", code=2)
    assert "fairseq2" in refscore_here(scored, "export", "--run", "r", "--format", "tlr", code=2)
