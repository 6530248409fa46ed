"""`refscore score --top-k`: a teacher's likeliest tokens at every position, from both engines."""

import math

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.engines.protocol import Request
from pipeline.engines.transformers import TransformersScorer
from pipeline.engines.vllm.runners import _top_of
from pipeline.errors import CheckError
from pipeline.pairs.encoding import Encoded
from pipeline.pairs.preferences import Dropped
from pipeline.precompute import top_tokens
from tests.conftest import experiment, make_tiny_model, preference_rows, refscore_here, refscore_in_turn, write_rows
from tests.engines.doubles import Positions

ROWS = [
    {"prompt": "How do I cook rice?", "response": "Boil it well."},
    {"prompt": "How do I cook rice?", "response": "Boil it."},
    {"prompt": "Hi " * 200, "response": "Too long."},
    {"prompt": [{"role": "user", "content": "Hi"}], "response": "The cat sat on the mat and the dog ran."},
]


@pytest.fixture
def where(tmp_path, tiny_model):
    return set_up(tmp_path, tiny_model)


def set_up(where, model):
    write_rows(where / "rows.jsonl", ROWS)
    experiment(where, model, write_rows(where / "d.jsonl", preference_rows(8)))
    return where


def asked(count, *overrides, rows="rows.jsonl", out="out.parquet"):
    sets = [argument for override in overrides for argument in ("--set", override)]
    return "score", rows, "--out", out, "--config", "experiment.yaml", "--top-k", count, *sets


def likeliest(where, count, *overrides, code=0):
    said = refscore_here(where, *asked(count, *overrides), code=code)
    return said, pl.read_parquet(where / "out.parquet")


@pytest.fixture(scope="module")
def of_vllm(tmp_path_factory, tiny_model):
    """What vLLM names of the rows, by how many are asked for, and of the damaged model's: code, what was said, table."""
    where = set_up(tmp_path_factory.mktemp("vllm"), tiny_model)
    damaged = damage(where)
    vllm = "reference.engine=vllm"
    ended = refscore_in_turn(
        where,
        asked(5, vllm, out="5.parquet"),
        asked(40, vllm, out="40.parquet"),
        asked(5, vllm, damaged, rows="one_is_spoilt.jsonl", out="damaged.parquet"),
    )
    return {
        name: (*one, pl.read_parquet(where / f"{name}.parquet"))
        for name, one in zip(("5", "40", "damaged"), ended, strict=True)
    }


def must_be_true(table, model, count):
    """Against a plain forward pass: the likeliest tokens in order, with their log-probabilities."""
    for row in table.filter(pl.col("problem").is_null()).iter_rows(named=True):
        ids = torch.tensor([[*row["prompt_ids"], *row["response_ids"]]])
        with torch.no_grad():
            every = model(ids).logits[0].log_softmax(1)[len(row["prompt_ids"]) - 1 : -1]
        truth = every.topk(count, dim=1)
        ours = np.array(row["top_logps"])
        assert ours.shape == (len(row["response_ids"]), count)
        np.testing.assert_allclose(ours, truth.values.numpy(), atol=1e-4)
        at_ids = every.gather(1, torch.tensor(row["top_ids"])).numpy()
        np.testing.assert_allclose(at_ids, ours, atol=1e-4)
        own = every.gather(1, torch.tensor(row["response_ids"])[:, None])[:, 0].numpy()
        np.testing.assert_allclose(row["logps"], own, atol=1e-4)


@pytest.mark.parametrize("count", [1, 7])
def test_transformers_names_the_likeliest(where, tiny_model, count):
    said, table = likeliest(where, count)
    assert f"the {count} likeliest tokens at every position of 3 responses" in said
    assert "1 rows with a problem" in said
    must_be_true(table, AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval(), count)
    dropped = table.row(2, named=True)
    assert dropped["problem"].startswith("too_long")
    assert dropped["top_ids"] is dropped["top_logps"] is dropped["logps"] is None


@pytest.mark.engine
@pytest.mark.parametrize("count", [5, 40])
def test_vllm_names_the_likeliest_also_more_than_it_answers_by_default(of_vllm, tiny_model, count):
    code, _, table = of_vllm[str(count)]
    assert code == 0
    must_be_true(table, AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval(), count)


def damage(where):
    """Set a model that gives NaN from the token that begins `Zebra` on, and write rows of which one has it."""
    from safetensors.torch import load_file, save_file

    from pipeline.config.training import PolicyConfig
    from pipeline.models.load import load_tokenizer

    model = make_tiny_model(where / "damaged", tie_word_embeddings=False)
    (bad,) = load_tokenizer(model, PolicyConfig(model=str(model))).convert_tokens_to_ids(["Z"])
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][bad] = math.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    # under another prompt each: a tree of one prompt is read together
    texts = {"Rice?": "Boil it.", "Who?": "The Zebra sat.", "Salt?": "A bit."}
    write_rows(where / "one_is_spoilt.jsonl", [{"prompt": prompt, "response": text} for prompt, text in texts.items()])
    return f"reference.model={model}"


def all_but_one_are_scored(code, said, table):
    assert code == 4
    assert "1 sequences have no finite score" in said
    assert table["problem"].is_null().to_list() == [True, False, True]
    assert table["problem"][1].startswith("not_finite value ")
    for name in ("logps", "logp", "top_ids", "top_logps"):
        assert table[name].is_null().to_list() == [False, True, False]
    assert table["top_logps"].explode().explode().drop_nulls().is_finite().all()


def test_a_row_without_finite_scores_says_so_and_the_command_ends_with_it(where):
    said = refscore_here(where, *asked(5, damage(where), rows="one_is_spoilt.jsonl"), code=4)
    all_but_one_are_scored(4, said, pl.read_parquet(where / "out.parquet"))


@pytest.mark.engine
def test_vllm_says_it_too(of_vllm):
    all_but_one_are_scored(*of_vllm["damaged"])


def test_likeliest_tokens_that_are_no_numbers_are_left_out_though_the_response_has_its_own(where, monkeypatch):
    """As of a token that the model can never say: its row is asked for once more by itself, as others may have spoiled it."""
    ask, alone = TransformersScorer.top, []

    def spoilt(self, sequences, count):
        alone.append(len(sequences))
        found = ask(self, sequences, count)
        longest = max(range(len(sequences)), key=lambda at: len(sequences[at].response_ids))
        if len(sequences[longest].response_ids) > 10:
            found[longest].logps[1, -1] = -math.inf
        return found

    monkeypatch.setattr(TransformersScorer, "top", spoilt)
    said, table = likeliest(where, 3, code=4)
    assert "1 sequences have no finite score" in said
    assert table["problem"][3].startswith("not_finite the likeliest tokens at 1 of ")
    assert table["top_ids"].is_null().to_list() == [False, False, True, True]
    assert alone == [3, 1]


def test_parts_are_small_where_many_tokens_are_asked_for(where, tiny_model, monkeypatch):
    asked, ask = [], TransformersScorer.top
    monkeypatch.setattr(
        TransformersScorer, "top", lambda self, rows, count: asked.append(len(rows)) or ask(self, rows, count)
    )
    _, whole = likeliest(where, 7)
    assert asked == [3]
    monkeypatch.setattr(top_tokens, "_VALUES", 1)
    _, parts = likeliest(where, 7)
    assert asked == [3, 1, 1, 1]
    must_be_true(parts, AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval(), 7)
    texts = pl.exclude("logps", "logp", "top_logps")
    assert parts.select(texts).equals(whole.select(texts))


@pytest.mark.parametrize(
    ("tokens", "count", "parts"),
    [([10, 10, 10], 4, [2, 1]), ([200, 10, 10, 200], 4, [1, 2, 1]), ([None, None], 4, [2]), ([], 4, [])],
)
def test_a_part_holds_as_many_values_as_are_allowed(monkeypatch, tokens, count, parts):
    monkeypatch.setattr(top_tokens, "_VALUES", 100)
    rows = [Dropped("s", 0, "empty", "") if of is None else Encoded(None, [0], [[1] * (of - 1)]) for of in tokens]
    assert [len(part) for part in top_tokens._parts(rows, count)] == parts


def test_vllm_marks_what_is_no_number_and_refuses_another_order():
    item = Request([1, 2], [3, 4])
    own_and_two = [[3, 5, 6], [4, 7, 8]]

    def answer(logps):
        ids = [0, 0, 0, *own_and_two[0], *own_and_two[1]]
        values = [0.0, 0.0, 0.0, *logps]
        return Positions(start_indices=[0, 0, 3, 6], end_indices=[0, 3, 6, 9], token_ids=ids, logprobs=values)

    found = _top_of(item, answer([-1, -2, -3, math.nan, math.nan, math.nan]), 2)
    assert found.ids.tolist() == [[5, 6], [7, 8]]
    assert found.logps.tolist() == [[-2, -3], [-math.inf, -math.inf]]
    with pytest.raises(CheckError, match="out of order"):
        _top_of(item, answer([-1, -3, -2, -1, -2, -3]), 2)


def test_more_tokens_than_the_model_has(where):
    said = refscore_here(
        where, "score", "rows.jsonl", "--out", "o.parquet", "--config", "experiment.yaml", "--top-k", 100000, code=2
    )
    assert "ask for 1 to" in said
    assert not (where / "o.parquet").exists()


def test_an_interruption_says_that_nothing_was_kept(where, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(TransformersScorer, "top", interrupted)
    arguments = ("score", "rows.jsonl", "--out", "o.parquet", "--config", "experiment.yaml", "--top-k", 3)
    assert "nothing of it was kept, and the same command begins again" in refscore_here(where, *arguments, code=1)
    assert not (where / "o.parquet").exists()
