"""vLLM's V2 runner without a GPU: vLLM's own validation and scoring worker behind a small scheduler with a prefix cache.

The scheduler is ours: requests in order, a token budget per step, whole blocks found by those that come later, also within
a step. What the installed vLLM does with the rows (`PromptLogprobsWorker`, `SamplingParams.verify`) is the real code, with
its Triton kernel replaced by the same arithmetic in torch; so is its silent None where the cache covers the first row.
"""

from types import SimpleNamespace

import numpy as np
import torch
import vllm.v1.worker.gpu.sample.prompt_logprob as real
from vllm.exceptions import VLLMValidationError


class V2Engine:
    """Has of `vllm.LLM` what the scorer uses; the model is a transformers one."""

    def __init__(self, model, block=16, budget=100, max_model_len=513):
        self.model, self.block, self.budget = model, block, budget
        self.cache, self.hidden, self.none = set(), {}, 0
        self.limits = SimpleNamespace(
            max_logprobs=20, max_model_len=max_model_len, get_vocab_size=lambda: model.config.vocab_size
        )
        self.llm_engine = SimpleNamespace(
            vllm_config=SimpleNamespace(use_v2_model_runner=True, cache_config=SimpleNamespace(block_size=block))
        )
        real.compute_token_logprobs = lambda logits, ids: logits.float().log_softmax(-1).gather(-1, ids)

    def generate(self, prompts, params, use_tqdm):
        assert len(prompts) == len(params)
        worker = real.PromptLogprobsWorker(len(prompts), torch.device("cpu"))
        requests = [self._admit(worker, at, *pair) for at, pair in enumerate(zip(prompts, params, strict=True))]
        waiting, rows = list(requests), {}
        while waiting:
            batch, left = [], self.budget
            while waiting and left:
                request = waiting[0]
                if request.done is None:
                    request.done = request.cached = self._hits(request)
                take = min(left, len(request.ids) - request.done)
                batch.append((request, take))
                left -= take
                # blocks are registered when they are scheduled, not when they are computed
                whole = (request.done + take) // self.block
                self.cache |= {tuple(request.ids[: n * self.block]) for n in range(1, whole + 1)}
                if request.done + take < len(request.ids):
                    break
                waiting.pop(0)
            rows |= self._step(worker, batch)
        return [self._output(request, rows.get(request.id)) for request in requests]

    def _admit(self, worker, at, prompt, params):
        ids = prompt["prompt_token_ids"]
        params._validate_logprobs(self.limits)
        if len(ids) >= self.limits.max_model_len:
            raise VLLMValidationError("no room for the sampled token")
        wanted = len(ids) - 1 - params.prompt_logprob_start
        if len(params.prompt_logprob_token_ids) != wanted:
            raise VLLMValidationError(f"{len(params.prompt_logprob_token_ids)} rows, the prompt has {wanted}")
        assert params.max_tokens == 1
        worker.add_request(str(at), at, params)
        return SimpleNamespace(id=str(at), ids=ids, done=None, cached=0, skip=params.skip_reading_prefix_cache)

    def _hits(self, request):
        if request.skip:
            return 0
        hits = 0
        # the last token is always computed
        while hits + self.block < len(request.ids) and tuple(request.ids[: hits + self.block]) in self.cache:
            hits += self.block
        return hits

    def _hidden(self, ids):
        if ids not in self.hidden:
            self.hidden[ids] = self.model.base_model(torch.tensor([ids])).last_hidden_state[0]
        return self.hidden[ids]

    @torch.no_grad()
    def _step(self, worker, batch):
        hidden = [self._hidden(tuple(one.ids))[one.done : one.done + take] for one, take in batch]
        takes = np.array([take for _, take in batch])
        lengths = np.array([len(one.ids) for one, _ in batch])
        step = SimpleNamespace(
            req_ids=[one.id for one, _ in batch],
            idx_mapping_np=np.arange(len(batch)),
            num_computed_prefill_tokens_np=np.array([one.done for one, _ in batch]),
            num_scheduled_tokens=takes,
            prefill_len_np=lengths,
            query_start_loc_np=np.concatenate([[0], np.cumsum(takes)]),
        )
        for one, take in batch:
            one.done += take
        return worker.compute_prompt_token_id_logprobs(self.model.lm_head, torch.cat(hidden), step, lengths)

    def _output(self, request, rows):
        self.none += rows is None
        return SimpleNamespace(
            prompt_token_id_logprobs=None if rows is None else rows.numpy(),
            num_cached_tokens=request.cached,
            prompt_token_ids=request.ids,
        )
