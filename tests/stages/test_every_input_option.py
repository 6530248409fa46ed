"""No silent no-op: changing any field of `data` and `reference` changes the pairs, the store, what an engine is told, or an error.

A real model of transformers scores. Doubles stand in for vLLM, for actors of Ray, and for a data set of the Hub;
a model of the Hub lies in a cache of the Hub's layout.
"""

import shutil
from concurrent.futures import Future
from types import SimpleNamespace

import datasets
import huggingface_hub.constants
import polars as pl
import pytest
import torch

import pipeline.engines.vllm.scorer
import pipeline.precompute.many.ray
from pipeline.config.experiment import DataConfig, ReferenceConfig
from pipeline.engines.growing import Growing
from pipeline.pairs.tokenised import making
from pipeline.precompute.many.worker import minutes_until_it_hangs
from pipeline.precompute.score import score_shards
from tests.conftest import experiment, make_tiny_model, preference_rows, refscore_here, write_rows
from tests.engines.doubles import Flat
from tests.hub import CODED, SECOND, make_hub

ON_VLLM = {"reference.engine": "vllm"}
# field: the change, and what must be set beside it (in both runs) for the field to have a meaning
CHANGES = {
    "data.path": ("other.jsonl", {}),
    "data.eval_path": ("other.jsonl", {}),
    "data.eval_fraction": (0.6, {}),
    "data.split": ("test", {"data.path": "folder"}),
    "data.revision": ("old", {"data.path": "tests/pairs"}),
    "data.columns": ("{prompt: question, chosen: good, rejected: bad}", {"data.path": "renamed.jsonl"}),
    "data.lists": ("all_pairs", {"data.path": "ranked.jsonl"}),
    "data.template": ("none", {}),
    "data.special_tokens": ("parse", {"data.path": "control.jsonl"}),
    "data.max_length": (70, {}),
    "data.too_long": ("truncate_response", {"data.max_length": 70}),
    "data.max_rows": (5, {}),
    "data.workers": (2, {}),
    "reference.model": ("other", {}),
    "reference.revision": (SECOND, {"reference.model": "tests/tiny"}),
    "reference.trust_remote_code": ("true", {"reference.model": "tests/tiny", "reference.revision": CODED}),
    "reference.adapter": ("adapter", {}),
    "reference.engine": ("vllm", {}),
    "reference.imported_by": (
        "b",
        {"reference.engine": "imported", "reference.imported_by": "a", "reference.store": "others"},
    ),
    "reference.dtype": ("bfloat16", {}),
    "reference.logps": ("fixed_point", {"reference.dtype": "bfloat16"}),
    "reference.store": ("elsewhere", {}),
    "reference.workers": (2, {}),
    "reference.launcher": ("ray", {"reference.workers": 2}),
    "reference.hangs_after": (7, {"reference.workers": 2}),
    "reference.tensor_parallel_size": (2, ON_VLLM),
    "reference.share_prompts": ("false", ON_VLLM),
    "reference.tokens_per_shard": (100, {}),
    "reference.max_batched_tokens": (64, ON_VLLM),
    "reference.kv_cache_gib": (2.5, ON_VLLM),
    "reference.engine_args": ("{max_num_seqs: 7}", ON_VLLM),
    "reference.device": ("cuda", {}),
    "reference.price_per_hour": (4, {}),
}


def test_every_field_is_walked():
    fields = {f"data.{name}" for name in DataConfig.model_fields}
    fields |= {f"reference.{name}" for name in ReferenceConfig.model_fields}
    assert fields == CHANGES.keys()


@pytest.fixture(scope="module")
def ground(tmp_path_factory, tiny_model):
    """A directory with data, models, an adapter and a cache of the Hub, and a memory of what runs without a change gave."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    where = tmp_path_factory.mktemp("options")
    rows = preference_rows(12)
    write_rows(where / "preferences.jsonl", rows)
    write_rows(where / "other.jsonl", rows[3:8])
    write_rows(
        where / "renamed.jsonl",
        [{"question": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in rows],
    )
    write_rows(
        where / "ranked.jsonl",
        [
            {"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"], "No."], "scores": [3, 2, 1]}
            for row in rows
        ],
    )
    write_rows(where / "control.jsonl", [{**row, "chosen": row["chosen"] + "<|end|>"} for row in rows])
    for split, part in (("train", rows[:8]), ("test", rows[8:])):
        write_rows(where / "folder" / f"{split}.jsonl", part)
    make_tiny_model(where / "other", seed=1)
    torch.manual_seed(2)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(LlamaForCausalLM.from_pretrained(tiny_model), lora).save_pretrained(where / "adapter")
    make_hub(where / "hub", tiny_model, where / "other")
    config = experiment(where, tiny_model, where / "preferences.jsonl")
    import_from_others(where, config)
    return where, config, {}


def import_from_others(where, config):
    """The scores of the tiny model under two names, those of "b" a little lower."""
    refscore_here(where, "precompute", "--config", config, "--run", "r")
    refscore_here(where, "export", "--run", "r", "--format", "trl", "--to", "exported")
    for name in ("a", "b"):
        rows = pl.concat([pl.read_parquet(where / f"exported/{split}.parquet") for split in ("train", "test")])
        if name == "b":
            rows = rows.with_columns(pl.col("ref_chosen_logps") - 0.5)
        rows.write_parquet(where / f"{name}.parquet")
        refscore_here(
            where, "import", f"{name}.parquet", "--config", config, "--by", name, "--set", "reference.store=others"
        )


@pytest.mark.usefixtures("all_processors")
@pytest.mark.parametrize("field", CHANGES)
def test_changing_it_changes_something(ground, field, monkeypatch):
    where, config, known = ground
    value, beside = CHANGES[field]
    name = repr(beside)
    if name not in known:
        known[name] = outcome(where, config, beside, monkeypatch)
    changed = outcome(where, config, {**beside, field: value}, monkeypatch)
    assert changed != known[name]
    # neither is an error, unless the error is what changes
    assert known[name][0] == 0 or field == "data.columns"
    assert changed[0] == 0 or field == "reference.device"


def test_without_a_change_nothing_changes(ground, monkeypatch):
    """Else the walk would pass for any field."""
    where, config, _ = ground
    for beside in ({}, ON_VLLM, {"data.path": "tests/pairs"}):
        assert outcome(where, config, beside, monkeypatch) == outcome(where, config, beside, monkeypatch)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"data.split": "test"}, "data.path names files only"),
        ({"data.revision": "old"}, "data.path names none"),
        ({"data.lists": "all_pairs"}, "data.path names no ranked lists"),
        ({"reference.revision": "old"}, "has no revisions"),
        ({"reference.kv_cache_gib": 2.5}, "needs reference.engine=vllm"),
        ({"reference.tensor_parallel_size": 2}, "needs reference.engine=vllm"),
        ({"reference.engine_args": "{max_num_seqs: 7}"}, "need reference.engine=vllm"),
        ({**ON_VLLM, "reference.engine_args": "{dtype: float16}"}, "dtype is set by the field dtype"),
        ({"reference.device": "cuda"}, "reference.device is cuda and no GPU is here"),
        ({"reference.logps": "fixed_point"}, "a hundred times more than arithmetic in float32 does"),
        (
            {"reference.engine": "imported", "reference.imported_by": "a", "reference.logps": "fixed_point"},
            "imported ones are kept as they came",
        ),
        ({"reference.model": "tests/tiny", "reference.trust_remote_code": "true"}, "as a full 40-digit commit"),
    ],
)
def test_a_field_that_nothing_would_read_is_refused(ground, setting, said, monkeypatch):
    where, config, _ = ground
    code, text, *_ = outcome(where, config, setting, monkeypatch)
    assert code == 2
    assert said in text


def outcome(where, config, settings, monkeypatch):
    """Exit code, what was said if it failed, pairs, drops, where shards lie and how large they are, what doubles were told."""
    told = []
    for name in ("data", "elsewhere"):
        shutil.rmtree(where / name, ignore_errors=True)
    with monkeypatch.context() as patch:
        doubles(patch, where, told)
        arguments = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        code, text = 0, ""
        try:
            said = refscore_here(where, "precompute", "--config", config, "--run", "r", *arguments)
            told.append(" spent" in said)
        except AssertionError as failed:  # it holds the exit code and what was said
            text, code = str(failed), 2 if "(2)" in str(failed) else 1
    run = where / "data/runs/r"
    tables = [
        pl.read_parquet(run / name).to_dicts() if (run / name).is_file() else None
        for name in ("pairs.parquet", "dropped.parquet")
    ]
    shards = sorted(
        (str(path.parent.parent.relative_to(where)), pl.read_parquet(path).height)
        for path in where.glob("**/scores-*.parquet")
    )
    told = [
        (one[0], [(ids, how.skip_reading_prefix_cache) for ids, how in one[1].sent]) if isinstance(one, tuple) else one
        for one in told
    ]
    return code, text, tables, shards, told


def doubles(patch, where, told):
    patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(where / "hub"))

    def load_dataset(name, split, revision, real=datasets.load_dataset):
        if name != "tests/pairs":
            return real(name, split=split, revision=revision)
        return datasets.Dataset.from_list(preference_rows(6 if revision == "old" else 9))

    patch.setattr(datasets, "load_dataset", load_dataset)

    def start_engine(directory, **options):
        engine = Flat()
        engine.llm_engine.vllm_config.cache_config.enable_prefix_caching = options["enable_prefix_caching"]
        engine.llm_engine.vllm_config.attention_config = SimpleNamespace(backend=None)
        engine.llm_engine.vllm_config.model_config = SimpleNamespace(
            dtype=getattr(torch, options["dtype"]), head_dtype=torch.float32
        )
        told.append((options, engine))
        return engine

    patch.setattr(pipeline.engines.vllm.scorer, "start_engine", start_engine)
    patch.setattr(pipeline.engines.vllm.scorer, "stop_engine", lambda engine: None)

    class Pool:
        """One that tokenises in this process."""

        def __init__(self, workers, context, begin, given):
            told.append(f"{workers} processes tokenise")
            (self.how,) = given

        def submit(self, _, made):
            making._make(made, self.how, self.how.tokenizer())
            done = Future()
            done.set_result(None)
            return done

        def shutdown(self, **_):
            pass

    patch.setattr(making, "ProcessPoolExecutor", Pool)

    def in_ray(target, shards, limit, on_shard, listener):
        config = target.reference.config
        told.append(f"{config.workers} workers, {config.launcher}, {minutes_until_it_hangs(config)} minutes")
        with Growing(target.reference, limit) as engine:
            return score_shards(target, shards, engine, on_shard)

    patch.setattr(pipeline.precompute.many.ray, "score_shards", in_ray)
