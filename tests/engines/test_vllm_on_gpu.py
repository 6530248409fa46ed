"""What vLLM is told where a GPU is, and what is refused: vLLM's own classes are doubled, as read in its source (0.32)."""

import sys
from types import SimpleNamespace

import pytest
import torch

import pipeline.engines.vllm.engine
import pipeline.engines.vllm.runners
import pipeline.engines.vllm.scorer
from pipeline.config.experiment import GenerateConfig, ReferenceConfig
from pipeline.engines import protocol
from pipeline.engines.protocol import must_run_here, numerics_of
from pipeline.engines.single import start_single
from pipeline.engines.vllm.engine import kv_cache_gib, sized_engine, start_engine
from pipeline.engines.vllm.generator import generator
from pipeline.engines.vllm.scorer import VllmScorer, batched_tokens
from pipeline.errors import CheckError, ConfigError
from pipeline.store.identity import Numerics
from tests.conftest import make_tiny_model
from tests.engines.doubles import Flat, Rows

QWEN = 151_936
NUMERICS = Numerics("vllm", "0.32.0", "cuda", "bfloat16", "float32")


@pytest.fixture
def gpu(monkeypatch):
    """As if there were one."""
    for module in (
        pipeline.engines.vllm.engine, pipeline.engines.vllm.runners, pipeline.engines.vllm.scorer, protocol,
    ):  # fmt: skip
        monkeypatch.setattr(module, "device_kind", lambda: "cuda")
    monkeypatch.setattr(pipeline.engines.vllm.engine, "prepare_environment", lambda *_: None)


@pytest.fixture
def started(gpu, monkeypatch):
    """Arguments of every LLM that is made; `started.kind` is its runner, `started.head` the dtype of its output layer."""
    made = SimpleNamespace(options=[], kind=Rows, head=torch.float32, stopped=0)

    def engine(**options):
        made.options.append(options)
        double = made.kind(v2=made.kind is Rows)
        double.llm_engine.vllm_config.cache_config.enable_prefix_caching = True
        double.llm_engine.vllm_config.attention_config = SimpleNamespace(backend=None)
        double.llm_engine.vllm_config.model_config = SimpleNamespace(
            dtype=getattr(torch, options["dtype"]), head_dtype=made.head
        )
        return double

    def stop(_):
        made.stopped += 1

    import vllm

    monkeypatch.setattr(vllm, "LLM", engine)
    monkeypatch.setattr(pipeline.engines.vllm.scorer, "stop_engine", stop)
    monkeypatch.setattr(pipeline.engines.vllm.engine, "stop_engine", stop)
    return made


def scorer(model, longest=100, **fields):
    return VllmScorer(ReferenceConfig(model=str(model), dtype="bfloat16", **fields), model, NUMERICS, longest)


def test_a_long_sequence_does_not_shrink_the_passes_of_a_runner_that_holds_few_rows(gpu):
    assert batched_tokens(QWEN, 1025, "cuda", response_rows=True) == 16384
    assert batched_tokens(QWEN, 1025, "cuda", response_rows=False) == 883
    assert batched_tokens(QWEN, 800, "cuda", response_rows=False) == 16384


def test_an_engine_that_turns_out_to_run_the_other_runner_is_started_again_smaller(started, tmp_path, monkeypatch):
    model = make_tiny_model(tmp_path / "model")
    monkeypatch.setattr(pipeline.engines.vllm.scorer, "_LOGITS_BYTES", 8)
    scorer(model, longest=300)
    assert [options["max_num_batched_tokens"] for options in started.options] == [16384]
    started.options.clear()
    started.kind = Flat
    assert scorer(model, longest=300).batched_tokens == 256
    assert [options["max_num_batched_tokens"] for options in started.options] == [16384, 256]
    assert started.stopped == 1
    # what the user sets stays
    started.options.clear()
    scorer(model, longest=300, max_batched_tokens=4000)
    assert [options["max_num_batched_tokens"] for options in started.options] == [4000]


def test_fewer_tokens_in_a_pass_free_memory_on_a_gpu(started, tmp_path):
    """vLLM's cache would otherwise take what is left up to gpu_memory_utilization, and halving the batch would free nothing."""
    model = make_tiny_model(tmp_path / "model")
    for tokens in (2**22, 2**21):
        scorer(model, max_batched_tokens=tokens)
    caches = [options["kv_cache_memory_bytes"] for options in started.options]
    assert caches[0] == pytest.approx(2 * caches[1], rel=0.01)
    scorer(model, kv_cache_gib=3.0)
    assert started.options[-1]["kv_cache_memory_bytes"] == 3 * 2**30


def test_the_cache_is_shared_by_the_gpus_of_a_model():
    config = SimpleNamespace(
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, num_hidden_layers=32, hidden_size=4096
    )
    assert kv_cache_gib(config, "bfloat16", 2**16, 1) == 8.0
    assert kv_cache_gib(config, "bfloat16", 2**16, 4) == 2.0


def test_scoring_and_sampling_are_told_what_suits_them(started, tmp_path, monkeypatch):
    model = make_tiny_model(tmp_path / "model")
    scorer(model, engine_args={"max_num_seqs": 5})
    assert started.options[-1]["enforce_eager"]
    assert started.options[-1]["max_num_seqs"] == 5
    assert started.options[-1]["hf_overrides"] == {"head_dtype": "float32"}
    monkeypatch.setattr(pipeline.engines.vllm.generator, "prepare_environment", lambda *_: None)
    spec = ReferenceConfig(model=str(model))
    for engine_args, eager, number in (({}, None, 256), ({"enforce_eager": True, "max_num_seqs": 9}, True, 9)):
        settings = GenerateConfig(dtype="bfloat16", max_tokens=20, engine_args=engine_args)
        with generator(model, spec, 10, settings):
            pass
        options = started.options[-1]
        # CUDA graphs, and a cache of what is free
        assert options.get("enforce_eager") == eager
        assert "kv_cache_memory_bytes" not in options
        assert options["max_num_seqs"] == number


@pytest.mark.parametrize(("engine_args", "waves"), [({"max_num_seqs": 2}, [8, 5]), ({}, [13])])
def test_what_runs_at_once_runs_four_times_before_it_is_told(engine_args, waves, started, tmp_path, monkeypatch):
    model = make_tiny_model(tmp_path / "model")
    monkeypatch.setattr(pipeline.engines.vllm.generator, "prepare_environment", lambda *_: None)
    settings = GenerateConfig(dtype="bfloat16", max_tokens=20, engine_args=engine_args)
    done, answer = [], SimpleNamespace(token_ids=[5], finish_reason="stop")
    monkeypatch.setattr(
        started.kind, "generate", lambda _, prompts, *__, **___: [SimpleNamespace(outputs=[answer])] * len(prompts)
    )
    with generator(model, ReferenceConfig(model=str(model)), 10, settings) as generate:
        generate([[5, number] for number in range(13)], settings, lambda responses, _: done.append(responses))
    assert done == waves


def test_on_a_cpu_the_cache_is_given_and_nothing_is_captured(monkeypatch, tmp_path):
    import vllm

    told = {}
    monkeypatch.setattr(vllm, "LLM", lambda **options: told.update(options))
    start_engine(tmp_path, kv_cache_gib=2.0, dtype="float32")
    assert (told["kv_cache_memory_bytes"], told["enforce_eager"]) == (2**31, True)
    monkeypatch.setattr(pipeline.engines.vllm.engine, "stop_engine", lambda _: None)
    config = SimpleNamespace(num_attention_heads=4, head_dim=8, num_hidden_layers=2, hidden_size=32)
    with sized_engine(tmp_path, config, "float32", 100):
        assert told["kv_cache_memory_bytes"] == 2**29
        assert told["max_num_seqs"] == 64


@pytest.mark.parametrize(("head", "said"), [(torch.bfloat16, "logits_dtype bfloat16"), (torch.float32, None)])
def test_what_the_engine_computes_with_is_read_back(started, tmp_path, head, said):
    """0.25's V2 runner ignores head_dtype: logits of bfloat16 would be stored as those of float32."""
    model = make_tiny_model(tmp_path / "model")
    started.head = head
    if said is None:
        scorer(model)
        return
    with pytest.raises(CheckError, match=said):
        scorer(model)
    assert started.stopped == 1


@pytest.mark.parametrize(
    ("version", "tested"),
    [("0.25.1", False), ("0.31.2", False), ("0.32.0", True), ("0.33.1rc1", True), ("0.34.0", False), ("1.0", False)],
)
def test_versions_outside_the_tested_range_are_refused_once_and_clearly(version, tested, monkeypatch):
    monkeypatch.setattr(protocol, "engine_version", lambda _: version)
    reference = ReferenceConfig()
    if tested:
        assert numerics_of(reference).engine_version == version
        return
    with pytest.raises(ConfigError, match=rf"vLLM {version} is installed.*Tested are 0.32 up to, not including, 0.34"):
        numerics_of(reference)
    monkeypatch.setenv(protocol.UNTESTED, "1")
    assert numerics_of(reference).engine_version == version
    monkeypatch.delenv(protocol.UNTESTED)
    # what does not use it does not mind
    numerics_of(ReferenceConfig(engine="transformers"))


def test_a_machine_without_a_gpu_plans_for_one_and_scores_nothing(tmp_path):
    here, there = (numerics_of(ReferenceConfig(device=device)) for device in ("auto", "cuda"))
    assert (here.device, here.dtype) == ("cpu", "float32")
    assert (there.device, there.dtype) == ("cuda", "bfloat16")
    must_run_here(here)
    for engine in ("vllm", "transformers"):
        reference = ReferenceConfig(device="cuda", engine=engine)
        with pytest.raises(ConfigError, match=r"no GPU is here: plans are made and scores joined on this machine"):
            start_single(reference, tmp_path, numerics_of(reference), 10)


def test_a_machine_with_a_gpu_computes_on_its_processors_if_it_is_told_to(gpu):
    must_run_here(Numerics("transformers", "5", "cpu", "float32", "float32"))
    with pytest.raises(ConfigError, match=r"set reference\.engine=transformers"):
        must_run_here(Numerics("vllm", "0.32.0", "cpu", "float32", "float32"))
    assert numerics_of(ReferenceConfig()).device == "cuda"


def test_numerics_are_named_for_what_they_are():
    """Attention of float32 is TF32 in vLLM's kernels; arguments that may change numbers are other numerics."""
    plain = numerics_of(ReferenceConfig(dtype="float32"))
    assert plain.described().keys() == {"engine", "engine_version", "device", "dtype", "logits_dtype", "quantization"}
    on_gpu = numerics_of(ReferenceConfig(dtype="float32", device="cuda"))
    assert on_gpu.described()["attention"] == "tf32"
    exact = numerics_of(ReferenceConfig(dtype="float32", device="cuda", engine="transformers"))
    assert "attention" not in exact.described()
    assert numerics_of(ReferenceConfig(dtype="float32", engine_args={"max_num_seqs": 3})) == plain
    other = numerics_of(ReferenceConfig(dtype="float32", engine_args={"quantization": "fp8", "max_num_seqs": 3}))
    assert other.described()["engine_args"] == '{"quantization": "fp8"}'


def test_an_argument_that_the_engine_does_not_have_is_named(gpu, tmp_path, monkeypatch):
    import vllm

    def engine(**options):
        raise TypeError("EngineArgs.__init__() got an unexpected keyword argument 'max_seqs'")

    monkeypatch.setattr(vllm, "LLM", engine)
    with pytest.raises(ConfigError, match=r"vLLM cannot load .*: .*unexpected keyword argument 'max_seqs'"):
        scorer(make_tiny_model(tmp_path / "model"), engine_args={"max_seqs": 5})


def test_an_older_vllm_is_not_asked_for_rows_that_it_does_not_have(gpu, monkeypatch):
    import vllm

    assert pipeline.engines.vllm.runners.response_rows_are_likely()
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert not pipeline.engines.vllm.runners.response_rows_are_likely()
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
    monkeypatch.setattr(vllm, "SamplingParams", SimpleNamespace())
    assert not pipeline.engines.vllm.runners.response_rows_are_likely()
    assert "vllm" in sys.modules
