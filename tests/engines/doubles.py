"""Doubles of vLLM's engines: a prefix cache that forgets as theirs does, and answers that only the very ids can give."""

import zlib
from types import SimpleNamespace

import numpy as np

BLOCK = 16


def true(ids, at):
    """The log-probability of the token at `at`: a number of exactly the ids up to it, with 24 bits at most."""
    return np.float32(-(1 + zlib.crc32(np.asarray(ids[: at + 1], np.int32).tobytes()) % 2**20) / 2**10)


def truth(request):
    ids = [*request.prompt_ids, *request.response_ids]
    return np.array([true(ids, at) for at in range(len(request.prompt_ids), len(ids))], np.float32)


class Engine:
    """A prefix cache of whole blocks, found by requests that come later, also in one call; keeps what it was sent."""

    def __init__(self, *, v2=False, spoil=lambda outputs: outputs):
        self.cached, self.read, self.sent, self.spoil = set(), 0, [], spoil
        config = SimpleNamespace(use_v2_model_runner=v2, cache_config=SimpleNamespace(block_size=BLOCK))
        self.llm_engine = SimpleNamespace(vllm_config=config)

    def generate(self, prompts, params, use_tqdm):
        assert len(prompts) == len(params)
        assert use_tqdm is False
        outputs = []
        for prompt, how in zip(prompts, params, strict=True):
            assert (how.max_tokens, how.temperature, how.detokenize, how.flat_logprobs) == (1, 0.0, False, True)
            ids = prompt["prompt_token_ids"]
            hits = 0
            # the last token is always computed
            while (
                not how.skip_reading_prefix_cache
                and hits + BLOCK < len(ids)
                and tuple(ids[: hits + BLOCK]) in self.cached
            ):
                hits += BLOCK
            self.cached |= {tuple(ids[:end]) for end in range(BLOCK, len(ids) + 1, BLOCK)}
            self.read += len(ids) - hits
            self.sent.append((ids, how))
            outputs.append(self.answer(ids, how, hits))
        return self.spoil(outputs)


class Flat(Engine):
    """V1: one entry per position but the first; what was not computed is whatever lay in memory."""

    def answer(self, ids, how, hits):
        if how.prompt_logprobs is None:
            return SimpleNamespace(prompt_logprobs=None, num_cached_tokens=hits)
        assert how.prompt_logprobs == 0
        values = [-0.25 if at - 1 < hits else true(ids, at) for at in range(1, len(ids))]
        flat = Positions([0, *range(len(ids) - 1)], [0, *range(1, len(ids))], list(ids[1:]), values)
        return SimpleNamespace(prompt_logprobs=flat, num_cached_tokens=hits)


class Positions(SimpleNamespace):
    def __init__(self, start_indices, end_indices, token_ids, logprobs):
        super().__init__(start_indices=start_indices, end_indices=end_indices, token_ids=token_ids, logprobs=logprobs)

    def __len__(self):
        return len(self.start_indices)


class Rows(Engine):
    """V2: the rows asked for, None if the cache held one of them."""

    def answer(self, ids, how, hits):
        wanted = np.asarray(how.prompt_logprob_token_ids)
        assert wanted.shape[1] <= 20
        assert len(wanted) == len(ids) - 1 - how.prompt_logprob_start
        if hits > how.prompt_logprob_start:
            return SimpleNamespace(prompt_token_id_logprobs=None, num_cached_tokens=hits)
        rows = np.full(wanted.shape, np.nan, np.float32)
        for row, tokens in enumerate(wanted):
            before = ids[: how.prompt_logprob_start + 1 + row]
            for column, token in enumerate(tokens):
                if token >= 0:
                    rows[row, column] = true([*before, token], len(before))
        return SimpleNamespace(prompt_token_id_logprobs=rows, num_cached_tokens=hits)
