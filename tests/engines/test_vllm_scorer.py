"""Real vLLM on the edge cases of sharing: every value equals the plain forward's, however the prompts are read."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import PROCESSORS, ROOT
from tests.engines.sequences import edge_cases, plain_logps
from tests.forked import MODULE, run

pytestmark = pytest.mark.engine
CASES = edge_cases(32)


@pytest.fixture(scope="session")
def scored(tiny_model, tmp_path_factory):
    """What vLLM gave in each way, in one process of its own."""
    target = tmp_path_factory.mktemp("scored") / "logps.npz"
    done = run(ROOT, MODULE, "tests.engines.vllm_worker", tiny_model, target)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(target))


@pytest.fixture(scope="session")
def true(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    return {name: [plain_logps(model, request) for request in group] for name, group in CASES.items()}


@pytest.mark.parametrize("case", CASES)
def test_shared_scores_equal_a_plain_forward(case, scored, true):
    at = sum(len(request.response_ids) for name in list(CASES)[: list(CASES).index(case)] for request in CASES[name])
    wanted = np.concatenate(true[case])
    assert np.abs(scored["shared"][at : at + len(wanted)] - wanted).max() < 1e-4


@pytest.mark.parametrize(
    "way",
    [
        "unshared",
        "sharing off",
        "shared, cache full",
        "shared, shuffled",
        "shared, five a call",
        "shared, prompts in pieces",
    ],
)
def test_every_way_of_reading_gives_the_same_bits(way, scored):
    assert np.array_equal(scored[way], scored["shared"])


def test_sharing_reads_less(scored):
    whole = sum(len(request) for group in CASES.values() for request in group)
    assert scored["tokens unshared"] == scored["tokens sharing off"] == whole
    # most of the cases are made to defeat sharing
    assert scored["tokens shared"] < 0.87 * whole


def test_the_packed_float32_output_layer_gives_what_vllms_own_gives(scored):
    packed, plain = scored["bfloat16"], scored["bfloat16, output layer as vLLM has it"]
    assert np.abs(packed - plain).max() < 1e-4
    # bfloat16 did run: its layers are farther from float32 than that
    assert np.abs(packed - scored["shared"]).max() > 1e-3


@pytest.mark.parametrize("way", ["v2", "v2, shuffled", "v2, block of 32", "v2 again"])
def test_the_v2_runner_gives_the_same_scores_and_its_silence_is_noticed(way, scored, true):
    wanted = np.concatenate([values for case in CASES for values in true[case]])
    assert np.abs(scored[way] - wanted).max() < 1e-4


def test_the_v2_runner_scores_siblings_without_asking_twice(scored):
    """The first row asked for is never in the cache, but where a prompt holds another's response or more than 19 leave."""
    assert scored["none v2"] <= 3
    # with a full cache the first branch of every prompt is refused, and read again
    assert scored["none v2 again"] > len(CASES)


def test_an_engine_that_was_stopped_leaves_no_weights_and_no_cache(scored):
    """Another one may start in this process."""
    assert len(scored["tensors left"]) > 50
    assert not scored["tensors left"].any()


@pytest.mark.usefixtures("all_processors")
@pytest.mark.skipif(len(PROCESSORS) < 2, reason="two processes need two processors")
@pytest.mark.skipif(not os.environ.get("REFSCORE_DEVICES"), reason="half a minute for one assert: make test-devices")
def test_a_model_that_is_spread_over_two_processes_gives_the_same_scores(tiny_model, scored, tmp_path):
    """Sums over the halves of a layer come in another order, so the last bits differ."""
    command = [sys.executable, "-m", "tests.engines.vllm_spread", str(tiny_model), str(tmp_path / "logps.npy")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = np.load(tmp_path / "logps.npy")
    assert np.abs(found - scored["shared"]).max() < 1e-4
