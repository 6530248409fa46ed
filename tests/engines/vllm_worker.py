"""Scores the edge cases with real vLLM in every way that must give the same: run in a process of its own by the tests."""

import random
import sys
import weakref
from pathlib import Path
from typing import ClassVar

import numpy as np

from pipeline.engines.vllm import engine as vllm_engine

vllm_engine.prepare_environment()  # before the first import of vLLM

from pipeline.config.experiment import ReferenceConfig
from pipeline.engines.protocol import numerics_of
from pipeline.engines.vllm import runners
from pipeline.engines.vllm import scorer as vllm_scoring
from tests.engines.sequences import LIMIT, edge_cases
from tests.engines.v2_engine import V2Engine


def main(model: Path, target: Path) -> None:
    """Save {way: all logps, concatenated in the order of the cases} and the tokens each way read."""
    requests = [request for group in edge_cases(32).values() for request in group]
    found: dict[str, np.ndarray] = {}
    read = _count_tokens_read()

    def keep(way, scorer, order, *, shared, call=None):
        read.clear()
        scores = {}
        size = call or len(order)
        for start in range(0, len(order), size):
            part = order[start : start + size]
            answers = runners.score_with(scorer._runner, [requests[at] for at in part], shared=shared)
            scores |= dict(zip(part, answers, strict=True))
        found[way] = np.concatenate([scores[at] for at in range(len(requests))])
        found[f"tokens {way}"] = np.array(sum(read))

    straight = list(range(len(requests)))
    shuffled = random.Random(1).sample(straight, len(straight))
    found |= v2_scores(model, requests, shuffled)
    with started(model) as scorer:
        keep("shared", scorer, straight, shared=True)
        scorer._llm.reset_prefix_cache()
        keep("unshared", scorer, straight, shared=False)
        keep("shared, cache full", scorer, straight, shared=True)
        scorer._llm.reset_prefix_cache()
        keep("shared, shuffled", scorer, shuffled, shared=True)
        keep("shared, five a call", scorer, shuffled, shared=True, call=5)
    with started(model, max_batched_tokens=80) as scorer:
        keep("shared, prompts in pieces", scorer, straight, shared=True)
    with started(model, share_prompts=False) as scorer:
        keep("sharing off", scorer, straight, shared=scorer._shares)
    with started(model, dtype="bfloat16") as scorer:
        keep("bfloat16", scorer, straight, shared=True)
    vllm_scoring.speed_up_float32_output_layer = lambda model: None
    with started(model, dtype="bfloat16") as scorer:
        keep("bfloat16, output layer as vLLM has it", scorer, straight, shared=True)
    found["tensors left"] = np.array([one() is not None for one in started.tensors])
    np.savez(target, **found)


def v2_scores(model: Path, requests, shuffled) -> dict[str, np.ndarray]:
    """The same with the V2 runner's double, and how many of its answers were None."""
    import torch
    from transformers import AutoModelForCausalLM

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # quicker for a model this small
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = {}
    for way, order, options in (
        ("v2", range(len(requests)), {}),
        ("v2, shuffled", shuffled, {"budget": 64}),
        ("v2, block of 32", range(len(requests)), {"block": 32, "budget": 4096}),
    ):
        engine = V2Engine(loaded, **options)
        runner = runners.runner_of(engine)
        assert isinstance(runner, runners.RowsRunner)
        # twice: the second time everything is in the cache already
        for again in ("", " again"):
            answers = runners.score_with(runner, [requests[at] for at in order], shared=True)
            scores = dict(zip(order, answers, strict=True))
            found[way + again] = np.concatenate([scores[at] for at in range(len(requests))])
            found[f"none {way}{again}"] = np.array(engine.none)
    torch.set_num_threads(threads)
    return found


class started:
    """A scorer on the model; its engine is stopped on leaving, and what it held is watched."""

    tensors: ClassVar[list[weakref.ref]] = []

    def __init__(self, model, **options):
        reference = ReferenceConfig(model=str(model), **options)
        self.scorer = vllm_scoring.VllmScorer(reference, model, numerics_of(reference), LIMIT)

    def __enter__(self):
        return self.scorer

    def __exit__(self, *_):
        llm = self.scorer._llm
        (weights,) = llm.apply_model(lambda model: [weakref.ref(one) for one in model.parameters()])
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        self.tensors += [*weights, *map(weakref.ref, runner.kv_caches)]
        vllm_engine.stop_engine(llm)


def _count_tokens_read():
    generate, read = runners._generate, []

    def counting(llm, prompts, params):
        outputs = generate(llm, prompts, params)
        read.extend(len(ids) - output.num_cached_tokens for ids, output in zip(prompts, outputs, strict=True))
        return outputs

    runners._generate = counting
    return read


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
