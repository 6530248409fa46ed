"""`llm:<url>` with vLLM's own server on loopback: verdicts, and an evaluation that was killed goes on where it stopped."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch

from pipeline.config.judges import JudgeConfig
from pipeline.evaluation.rates.winrates import win_rate
from pipeline.judges.judging import Duel, Prompt, Response
from pipeline.judges.open import JudgeContext, open_judge
from tests.conftest import ROOT, make_tiny_model, make_tiny_tokenizer
from tests.judges.ask_judge import ask

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """vLLM's server with a tiny model that knows no other words than A and B."""
    from transformers import LlamaForCausalLM

    directory = make_tiny_model(
        tmp_path_factory.mktemp("served") / "tiny", tie_word_embeddings=False, max_position_embeddings=2048
    )
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    letters = [make_tiny_tokenizer()(letter, add_special_tokens=False)["input_ids"][0] for letter in "AB"]
    with torch.no_grad():
        # a direction that every position has, and that only the two letters' outputs look at
        model.model.embed_tokens.weight[:, 0] = 10.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[letters, 0] = 3.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(directory)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    log = (directory / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", directory, "--served-model-name", "tiny",
         "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "2048", "--enforce-eager"],
        env=environment, stdout=log, stderr=log,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}/v1"
    try:
        for _ in range(600):
            assert process.poll() is None, (directory / "log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{url}/models", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


def keys(directory):
    return [
        json.loads(line)["key"]
        for path in directory.iterdir()
        for line in path.read_text().splitlines()
        if line.endswith("}")
    ]


def test_a_killed_evaluation_goes_on_and_asks_nothing_twice(server, tmp_path):
    directory = tmp_path / "verdicts"
    killed = subprocess.Popen([sys.executable, "-m", "tests.judges.ask_judge", server, directory, "20"], cwd=ROOT)
    for _ in range(6000):
        if directory.is_dir() and len(keys(directory)) >= 6:
            break
        assert killed.poll() is None, "it came to its end before it could be killed"
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    before = keys(directory)
    assert 6 <= len(before) < 40

    judged = ask(server, directory, 20)
    after = keys(directory)
    assert after[: len(before)] == before
    assert len(after) == len(set(after)) == 40
    assert all(one.score is not None and 0 <= one.score <= 1 for one in judged)
    assert win_rate(judged).prompts == 20
    # and a third time asks nobody
    assert ask(server, directory, 20) == judged
    assert keys(directory) == after


def test_vllm_holds_a_reasoned_reply_to_the_schema(server, tmp_path):
    """The model was taught A and B alone: it is cut off in the comparison or before it, but what there is is the schema's JSON."""
    judge = JudgeConfig(name=f"llm:{server}", verdict="reasoning", max_tokens=40)
    duel = Duel(Prompt("0", "prompt"), Response("rice", "stop"), Response("a cat", "stop"))
    assert open_judge(judge, JudgeContext(tmp_path)).prefer([duel]) == [None]
    (file,) = tmp_path.iterdir()
    reply = json.loads(file.read_text())["reply"]
    assert re.fullmatch(r'<think>\{\s*("comparison"\s*:\s*"[^"]*)?', reply)
