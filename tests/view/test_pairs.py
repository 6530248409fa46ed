"""Pages of pairs and of dropped rows: margins before and after, imported scores, files that cannot be read."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.artifacts.schemas import JUDGEMENTS, KL, METRICS, PAIRS, SAMPLES
from pipeline.artifacts.tables import read_table, write_table
from pipeline.errors import DataError
from pipeline.view import answers, pairs, pieces
from pipeline.view.answers import answer
from pipeline.view.pairs import dropped, pairs_index, pairs_page
from pipeline.view.training import training
from tests.conftest import ROOT
from tests.view.runs import TOPICS, make_run, write_dropped, write_metrics, write_pairs


def test_the_index_has_both_margins_and_the_step_of_the_last_visit():
    run = make_run()
    index = pairs_index(run)
    assert index["total"] == len(index["pair_id"]) == 60
    for row in range(60):
        held_out = row % 5 == 0
        assert index["pair_id"][row] == f"{row:012x}"
        assert index["start"][row] == f"Question {row}?"
        assert index["held_out"][row] is held_out
        assert index["topics"][index["topic"][row]] == TOPICS[row % 3]
        assert [side[row] for side in index["tokens"]] == [3, 2]
        sums = [-10.0 - row % 7, -10.0 - row % 5]
        assert [side[row] for side in index["reference"]] == sums
        if row % 11 == 0:
            assert index["step"][row] is None
            assert [side[row] for side in index["policy"]] == [None, None]
        else:
            step = 16 if held_out else row % 16  # of a held-out pair the later of its two visits
            moved = 0.5 * (row % 4 - 1.5) * bool(step)
            assert index["step"][row] == step
            assert [side[row] for side in index["policy"]] == [sums[0] + moved, sums[1] - moved]


def test_pages_of_pairs_hold_every_row_once():
    run = make_run()
    assert [len(pairs_page(run, page)["rows"]) for page in (0, 1)] == [50, 10]
    found = [row for page in (0, 1) for row in pairs_page(run, page)["rows"]]
    for number, row in enumerate(found):
        assert row["pair_id"] == f"{number:012x}"
        assert (row["source"], row["source_row"], row["prompt"]) == ("data.jsonl", number, f"Question {number}?")
        assert row["texts"] == [f"{side} answer {number}, good" for side in ("chosen", "rejected")]
        assert [next(text for text, differs in parts if differs).strip() for parts in row["parts"]] == [
            "chosen",
            "rejected",
        ]
        assert row["pieces"] == [["<1>", "<2>", f"<{number % 9}>"], ["<3>", "<4>"]]
        assert row["logps"] == [[-7.0 - number % 7, -1.0, -2.0], [-6.0 - number % 5, -4.0]]
    with pytest.raises(DataError, match="no page 2: there are 60 rows, 50 on a page"):
        pairs_page(run, 2)


def test_imported_pairs_have_sums_and_no_tokens():
    run = make_run()
    write_pairs(run, tokens=False)
    assert {row["logps"][0] for page in (0, 1) for row in pairs_page(run, page)["rows"]} == {None}
    assert pairs_index(run)["reference"][0][3] == -13.0


def test_before_a_training_nothing_is_known_of_the_policy():
    run = make_run()
    run.policy_logps.unlink()
    index = pairs_index(run)
    assert set(index["step"]) == set(index["policy"][0]) == set(index["policy"][1]) == {None}


def test_more_pairs_than_a_browser_takes_are_counted_and_not_sent(monkeypatch):
    run = make_run()
    for module in (pairs, answers):
        monkeypatch.setattr(module, "MOST", 55)
    index = pairs_index(run)
    assert (index["total"], len(index["pair_id"])) == (60, 55)
    assert len(pairs_page(run, 1)["rows"]) == 5
    assert [one for one in answers.addresses(["one"]) if "/pairs/" in one] == [
        f"runs/one/pairs/{page}.json" for page in (0, 1)
    ]


def test_pairs_of_an_older_format_are_a_message_that_says_what_to_run():
    run = make_run()
    table = read_table(run.pairs, PAIRS)
    names = {"ref_chosen_logps": "ref_chosen_logp", "ref_rejected_logps": "ref_rejected_logp"}
    names |= {"ref_chosen_token_logps": "ref_chosen_logps", "ref_rejected_token_logps": "ref_rejected_logps"}
    old = table.rename_columns([names.get(name, name) for name in table.column_names])
    pq.write_table(old.replace_schema_metadata({"refscore_format": "1"}), run.pairs)
    for ask in (lambda: pairs_index(run), lambda: pairs_page(run, 0)):
        with pytest.raises(DataError, match=r"format 1, written by an older refscore.*run 'refscore precompute' again"):
            ask()


@pytest.mark.parametrize("name", ["pairs", "dropped", "policy_logps", "metrics"])
def test_a_damaged_file_is_a_message(name):
    run = make_run()
    getattr(run, name).write_bytes(b"PAR1 no parquet PAR1")
    ask = {"dropped": dropped, "metrics": training}.get(name, pairs_index)
    with pytest.raises(DataError, match=rf"{name}\.parquet cannot be read as Parquet.*make it again"):
        ask(run)


def test_a_page_of_pairs_looks_for_the_tokenizer_without_reading_the_configuration_each_time(monkeypatch):
    read = []
    monkeypatch.setattr(pieces, "read_saved_config", lambda run: read.append(run) or {})
    run = make_run("settings")
    pairs_page(run, 0)
    assert len(read) == 1  # it took four seconds, once for each response


def test_pieces_are_the_tokenizers_texts_and_ids_where_it_knows_none():
    from tokenizers import Tokenizer, decoders, models

    run = make_run("words")
    vocabulary = {"<script>": 1, "\u202e": 2, "plain": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="plain"))
    tokenizer.decoder = decoders.Fuse()
    run.model.mkdir()
    tokenizer.save(str(run.model / "tokenizer.json"))
    row = pairs_page(run, 0)["rows"][8]
    assert row["pieces"] == [["<script>", "[U+202E]", "<8>"], ["plain", "<4>"]]
    (run.model / "tokenizer.json").write_text("{}")
    assert pairs_page(run, 0)["rows"][8]["pieces"][1] == ["<3>", "<4>"]


@pytest.mark.parametrize("model", ["~nobody-of-this-name/x", '"a\\0b"', "[1]", "org/name", "embedded:none"])
def test_a_reference_that_is_nowhere_has_no_tokenizer(model):
    run = make_run("nowhere")
    run.config.write_text(f"reference: {{model: {model}}}\n")
    assert pairs_page(run, 0)["rows"][0]["pieces"][1] == ["<3>", "<4>"]


@pytest.mark.parametrize(("table", "schema", "page", "names"), [
    ("pairs", PAIRS, "pairs/0", ("prompt", "chosen", "rejected", "chosen_ids", "rejected_ids")),
    ("samples", SAMPLES, "samples/0/0", ("prompt", "response", "finish_reason", "tokens")),
    ("kl", KL, "tokens/0", ("response_ids",)),
    ("judgements", JUDGEMENTS, "samples/0/0", ("winner",)),
])  # fmt: skip
def test_a_table_that_lacks_what_every_row_has_is_a_message(table, schema, page, names):
    run = make_run()
    path = getattr(run, table)
    whole = read_table(path, schema).to_pylist()
    for name in names:
        rows = [row | {name: None} if number == 1 else row for number, row in enumerate(whole)]
        write_table(path, pa.Table.from_pylist(rows, schema=schema))
        with pytest.raises(DataError, match=rf"{table}\.parquet has no {name} in row 1, which no refscore wrote"):
            answer(f"runs/one/{page}.json")
    # what may be unknown is no damage
    write_table(
        path,
        pa.Table.from_pylist([row | {"topic": None, "score": None, "words": None} for row in whole], schema=schema),
    )
    answer(f"runs/one/{page}.json")


def test_dropped_rows_are_counted_by_reason():
    run = make_run()
    found = dropped(run)
    assert found["total"] == 30
    assert [list(one) for one in found["reasons"]] == [["too_long", 20], ["duplicate", 10]]
    assert found["rows"][5] == ["data.jsonl", 5, "duplicate", "detail 5"]
    write_dropped(run, count=0)
    assert (dropped(run)["total"], dropped(run)["rows"]) == (0, [])


def test_a_training_says_how_far_it_came_and_since_when_something_looked_wrong():
    run = make_run()
    found = training(run)
    assert (found["steps"], found["step"]) == (16, list(range(1, 17)))
    assert found["columns"]["eval_loss"][2:5] == [None, 0.72, None]
    assert "peak_memory_gib" not in found["columns"]  # nothing is in it
    # below chance in every evaluation; one alone says nothing yet
    assert [one["step"] for one in found["findings"]] == [8]
    assert "below chance" in found["findings"][0]["sentence"]
    write_metrics(run, 6)
    assert answer("runs/one/training.json")["step"] == [1, 2, 3, 4, 5, 6]


def test_every_logged_metric_has_a_picture():
    script = (ROOT / "pipeline/view/static/training.js").read_text(encoding="utf-8")
    assert [name for name in METRICS.names if name != "step" and f'"{name}"' not in script] == []


def test_nothing_but_finite_numbers_goes_into_json():
    run = make_run()
    table = read_table(run.pairs, PAIRS).to_pylist()
    table[0] |= {
        "ref_chosen_logps": float("nan"),
        "ref_rejected_logps": float("inf"),
        "ref_chosen_token_logps": [float("nan"), -1.0, None],
    }
    write_table(run.pairs, read_table(run.pairs, PAIRS).from_pylist(table, schema=PAIRS))
    assert [side[0] for side in pairs_index(run)["reference"]] == [None, None]
    assert pairs_page(run, 0)["rows"][0]["logps"][0] == [None, -1.0, None]
    assert answers.as_json({"value": float("nan"), "list": [float("inf"), 1.5]}) == b'{"value":null,"list":[null,1.5]}'
