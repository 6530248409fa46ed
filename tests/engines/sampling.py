"""A double of vLLM's sampling in this process: what it writes is drawn from all that it is given."""

import random
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import pipeline.engines.vllm.generator
from tests.conftest import make_tiny_tokenizer


def sample_here(patch, told):
    """Let the double sample instead of vLLM; `told` is given what its engines are started with."""
    patch.setattr(
        pipeline.engines.vllm.generator, "sized_engine", lambda *given, **how: _sized_engine(told, *given, **how)
    )


@contextmanager
def _sized_engine(told, directory, config, dtype, length, **options):
    told.append((directory.name, dtype, options.get("max_num_seqs")))
    yield SimpleNamespace(
        generate=lambda inputs, params, **_: [_sampled(directory, *one) for one in zip(inputs, params, strict=True)]
    )


def _sampled(directory, prompt, params):
    """A response drawn from the model's name, the prompt, and how it is asked."""
    asked = (
        directory.name,
        prompt["prompt_token_ids"],
        params.seed,
        params.temperature,
        params.top_p,
        params.min_tokens,
    )
    draw = random.Random(repr(asked))
    length = params.max_tokens if params.min_tokens else draw.randint(3, 20)
    words = [draw.choice(["the cat", " sat", " on", " mat.", " dog", " ran"]) for _ in range(length)]
    ids = _tokenizer()("".join(words), add_special_tokens=False)["input_ids"][: params.max_tokens]
    reason = "length" if len(ids) == params.max_tokens else "stop"
    return SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, finish_reason=reason)])


@cache
def _tokenizer():
    return make_tiny_tokenizer()
