"""Engines of generation and of judges are stopped however their work ends, Ctrl-C included."""

import pytest

import pipeline.engines.vllm.engine
from pipeline.engines.vllm.engine import running_engine


@pytest.mark.parametrize("ending", [None, RuntimeError, KeyboardInterrupt])
def test_an_engine_is_stopped_however_its_block_ends(monkeypatch, tmp_path, ending):
    seen = []
    monkeypatch.setattr(pipeline.engines.vllm.engine, "start_engine", lambda directory, **options: (directory, options))
    monkeypatch.setattr(pipeline.engines.vllm.engine, "stop_engine", seen.append)
    if ending is None:
        with running_engine(tmp_path, dtype="float32") as engine:
            assert seen == []
    else:
        with pytest.raises(ending), running_engine(tmp_path, dtype="float32") as engine:
            raise ending
    assert seen == [engine] == [(tmp_path, {"dtype": "float32"})]


@pytest.mark.parametrize("module", ["engines.vllm.generator", "judges.local", "judges.reward_model"])
def test_nobody_starts_an_engine_without_its_end(module):
    """What is started by hand can be forgotten: these modules know the block alone."""
    names = vars(__import__(f"pipeline.{module}", fromlist=["_"]))
    assert "sized_engine" in names
    assert not {"start_engine", "stop_engine"} & names.keys()
