"""`llm:<directory or id>`: a local model in vLLM as a judge of duels.

`verdict: token` reads the probabilities of the letters A and B from one forward pass; `reasoning` lets the model write
first and parses the verdict it ends with.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.judges import JudgeConfig
from pipeline.config.rubrics import read_rubric
from pipeline.engines.protocol import engine_version
from pipeline.engines.vllm.engine import prepare_environment, sized_engine
from pipeline.engines.vllm.generator import stop_ids
from pipeline.errors import ConfigError
from pipeline.judges.asking.prompts import LETTERS, letter_of, question, weighed, wording
from pipeline.judges.asking.verdicts import cut_off_thinking, read_verdict
from pipeline.judges.encoding import encode_turns, knows_thoughts, opens_thought, reply_text
from pipeline.judges.judging import Duel, Judge
from pipeline.judges.memory import Verdict, Verdicts, verdict_key
from pipeline.judges.reward_model import judge_dtype
from pipeline.models.configuration import position_limit, text_config
from pipeline.models.identity import behaviour_digest
from pipeline.models.load import Named, load_tokenizer
from pipeline.models.locate import locate
from pipeline.progress import SILENT, Listener

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_WAVE = 512


def open_local(settings: JudgeConfig, verdicts: Verdicts, listener: Listener = SILENT) -> Judge:
    """The judge; loads nothing before the first duel that `verdicts` does not know."""
    spec = Named(settings.argument)
    directory = locate(spec)
    tokenizer = load_tokenizer(directory, spec)
    if not tokenizer.chat_template:
        raise ConfigError(f"judge {settings.shown}: a model without a chat template cannot be asked")
    if settings.verdict == "token" and opens_thought(tokenizer):
        raise ConfigError(
            f"judge {settings.shown}: its template has it think before it replies: use verdict: reasoning"
        )
    how = f"token {settings.min_mass}" if settings.verdict == "token" else f"reasoning {settings.max_tokens}"
    if knows_thoughts(tokenizer):
        how += " thoughts apart"
    engine = engine_version("vllm")
    rubric = read_rubric(settings.rubric) if settings.rubric else None
    identity = f"{behaviour_digest(directory)} {engine} {judge_dtype(settings)} {how} {wording(rubric)}"
    asked: list[str] = []
    read = None if settings.verdict == "token" else read_verdict

    def keys_of(duels: Sequence[Duel]) -> list[str]:
        return [verdict_key(identity, (duel.prompt.text, duel.first.text, duel.second.text)) for duel in duels]

    def prefer(duels: Sequence[Duel]) -> list[float | None]:
        keys = keys_of(duels)
        asked.extend(keys)

        def ask(missing: dict[str, Duel]) -> None:
            turns = {key: question(duel, settings.verdict, rubric) for key, duel in missing.items()}
            _ask_all(directory, tokenizer, settings, turns, verdicts, listener)

        return verdicts.values(keys, duels, ask, read)

    def cost() -> dict[str, float]:
        answered = [verdict for key in dict.fromkeys(asked) if (verdict := verdicts.get(key))]
        return {
            "requests": len(answered),
            "tokens_in": sum(reply.tokens_in for reply in answered),
            "tokens_out": sum(reply.tokens_out for reply in answered),
        }

    return Judge(settings.shown, prefer, cost=cost, words=lambda duels: verdicts.words(keys_of(duels)))


def letter_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Every single token that says just A, or just B. Raises ConfigError if the vocabulary has none."""
    tokens_of_letter: dict[str, list[int]] = {letter: [] for letter in LETTERS}
    for letter in LETTERS:
        for text in (letter, f" {letter}", letter.lower(), f" {letter.lower()}"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if (
                len(ids) == 1
                and letter_of(str(tokenizer.decode(ids))) == letter
                and ids[0] not in tokens_of_letter[letter]
            ):
                tokens_of_letter[letter].append(int(ids[0]))
    if not all(tokens_of_letter.values()):
        raise ConfigError("the judge's vocabulary has no single token for A and B: use verdict: reasoning")
    return tokens_of_letter


def _ask_all(
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    settings: JudgeConfig,
    turns: dict[str, str],
    verdicts: Verdicts,
    listener: Listener,
) -> None:
    prepare_environment()
    from vllm import SamplingParams, TokensPrompt

    one_token = settings.verdict == "token"
    letters = letter_ids(tokenizer) if one_token else {}
    new_tokens = 1 if one_token else settings.max_tokens
    prompts = _fitting(directory, tokenizer, settings, turns, new_tokens)
    if not prompts:
        return
    length = max(map(len, prompts.values())) + new_tokens + 1
    params = SamplingParams(
        max_tokens=new_tokens,
        temperature=0.0,
        detokenize=False,
        stop_token_ids=stop_ids(directory, tokenizer),
        logprob_token_ids=[token for ids in letters.values() for token in ids] or None,
    )
    config = text_config(directory)
    with (
        sized_engine(directory, config, judge_dtype(settings), length, skip_tokenizer_init=True) as engine,
        listener.progress(f"{settings.shown} judges", len(prompts)) as ticker,
    ):
        keys, inside_thought, cut_off = list(prompts), opens_thought(tokenizer), 0
        # wave by wave, so that a kill loses one wave
        for start in range(0, len(keys), _WAVE):
            wave = keys[start : start + _WAVE]
            inputs = [TokensPrompt(prompt_token_ids=prompts[key]) for key in wave]
            for key, output in zip(wave, engine.generate(inputs, params, use_tqdm=False), strict=True):
                reply = output.outputs[0]
                text = reply_text(tokenizer, list(reply.token_ids), inside_thought=inside_thought)
                value = read_verdict(text)
                if one_token:
                    seen = {token: math.exp(entry.logprob) for token, entry in reply.logprobs[0].items()}
                    first, second = (sum(seen.get(token, 0.0) for token in letters[letter]) for letter in LETTERS)
                    value = weighed(first, second, settings.min_mass)
                elif cut_off_thinking(text):
                    cut_off += 1
                verdicts.add(key, Verdict(value, text, len(prompts[key]), len(reply.token_ids)))
                ticker.advance_tokens(1, len(prompts[key]) + len(reply.token_ids))
    if cut_off:
        log.warning(
            "judge %s: %d replies end inside a thought: raise its max_tokens (%d)",
            settings.shown, cut_off, settings.max_tokens,
        )  # fmt: skip


def _fitting(
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    settings: JudgeConfig,
    turns: dict[str, str],
    new_tokens: int,
) -> dict[str, list[int]]:
    limit = position_limit(directory)
    fitting = {}
    for key, turn in turns.items():
        ids = encode_turns(tokenizer, [{"role": "user", "content": turn}], reply_next=True)
        if limit is None or len(ids) + new_tokens < limit:
            fitting[key] = ids
    if len(fitting) < len(turns):
        log.warning("judge %s: %d duels are longer than it reads", settings.shown, len(turns) - len(fitting))
    return fitting
