"""`llm:<url>`: a judge behind a server that speaks OpenAI's protocol (vLLM, SGLang, llama.cpp, OpenAI and others).

Every verdict is kept as it comes, so a killed evaluation goes on where it stopped. The key is read from the environment,
sent to that server only, and written nowhere.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipeline.config.judges import JudgeConfig
from pipeline.errors import ConfigError, RefscoreError, first_line
from pipeline.judges.judging import Duel, Judge
from pipeline.judges.memory import Verdict, Verdicts, verdict_key
from pipeline.judges.prompts import letter_of, question, weighed, wording
from pipeline.judges.verdicts import read_verdict

if TYPE_CHECKING:
    from openai import OpenAI

_TOP = 20
# so many connections refused in a row mean that nobody is there
_GIVE_UP = 8


def open_remote(settings: JudgeConfig, verdicts: Verdicts) -> Judge:
    """The judge at `settings.argument`. Nothing is sent before the first duel that `verdicts` does not know."""
    asked: list[str] = []
    how = f"token {settings.min_mass}" if settings.verdict == "token" else f"reasoning {settings.max_tokens}"

    def prefer(duels: Sequence[Duel]) -> list[float | None]:
        model = settings.model or _only_model(settings)
        identity = f"{settings.argument} {model} {how} {wording()}"
        keys = [verdict_key(identity, (duel.prompt.text, duel.first.text, duel.second.text)) for duel in duels]
        asked.extend(keys)
        return verdicts.values(keys, duels, lambda missing: _ask_all(settings, model, missing, verdicts))

    def cost() -> dict[str, float]:
        answered = [verdict for key in dict.fromkeys(asked) if (verdict := verdicts.get(key))]
        tokens_in, tokens_out = (
            sum(getattr(reply, name) for reply in answered) for name in ("tokens_in", "tokens_out")
        )
        price = (tokens_in * settings.price_in + tokens_out * settings.price_out) / 1e6
        return {"requests": len(answered), "tokens_in": tokens_in, "tokens_out": tokens_out, "price": price}

    return Judge(settings.shown, prefer, cost=cost)


def _ask_all(settings: JudgeConfig, model: str, missing: dict[str, Duel], verdicts: Verdicts) -> None:
    import openai

    client, wait = _client(settings), _limiter(settings.requests_per_minute)
    refused = 0

    def ask(key: str, duel: Duel) -> None:
        wait()
        verdicts.add(key, _ask(client, settings, model, duel))

    pool = ThreadPoolExecutor(settings.concurrency)
    try:
        for done in as_completed([pool.submit(ask, key, duel) for key, duel in missing.items()]):
            try:
                done.result()
                refused = 0
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                raise ConfigError(
                    f"judge {settings.shown}: the server refuses ({first_line(error)}). The key is read from the "
                    f"environment variable {settings.key_env}, the model is {model!r}"
                ) from None
            except openai.APIConnectionError as error:
                refused += 1
                if refused >= _GIVE_UP:
                    raise RefscoreError(
                        f"judge {settings.shown}: {settings.argument} cannot be reached ({first_line(error)}). Verdicts "
                        f"given so far are kept in {verdicts.path}: the same command goes on from there"
                    ) from None
            except openai.APIError:
                pass  # failed after its retries: counted as a failure, asked again by the next evaluation
    finally:
        pool.shutdown(cancel_futures=True)


def _ask(client: OpenAI, settings: JudgeConfig, model: str, duel: Duel) -> Verdict:
    how: dict[str, Any] = (
        {"max_tokens": 1, "logprobs": True, "top_logprobs": _TOP}
        if settings.verdict == "token"
        else {"max_tokens": settings.max_tokens}
    )
    turn: Any = [{"role": "user", "content": question(duel, settings.verdict)}]
    reply = client.chat.completions.create(model=model, messages=turn, temperature=0.0, **how)
    text = (reply.choices[0].message.content or "") if reply.choices else ""
    value = read_verdict(text)
    if settings.verdict == "token" and reply.choices:
        value = _from_logprobs(reply.choices[0].logprobs, text, settings)
    usage = reply.usage
    return Verdict(value, text, usage.prompt_tokens if usage else 0, usage.completion_tokens if usage else 0)


def _from_logprobs(logprobs: Any, text: str, settings: JudgeConfig) -> float | None:
    if not (logprobs and logprobs.content):
        # a server without log-probabilities: the letter itself
        letter = letter_of(text)
        return None if letter is None else float(letter == "A")
    mass = {"A": 0.0, "B": 0.0}
    for entry in logprobs.content[0].top_logprobs:
        if letter := letter_of(entry.token):
            mass[letter] += math.exp(entry.logprob)
    return weighed(mass["A"], mass["B"], settings.min_mass)


def _client(settings: JudgeConfig) -> OpenAI:
    from openai import OpenAI

    key = os.environ.get(settings.key_env, "")
    parts = urlsplit(settings.argument)
    if key and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise ConfigError(
            f"judge {settings.shown}: {settings.key_env} is set, but over http:// the key would travel unencrypted: "
            "use https://, or unset it if the server wants none"
        )
    return OpenAI(
        base_url=settings.argument, api_key=key or "none", max_retries=settings.retries, timeout=settings.timeout
    )


def _only_model(settings: JudgeConfig) -> str:
    import openai

    try:
        served = [model.id for model in _client(settings).models.list()]
    except openai.OpenAIError as error:
        raise RefscoreError(
            f"judge {settings.shown}: {settings.argument}/models does not answer ({first_line(error)}). "
            "Is the server running? A server without that address needs the judge's `model`"
        ) from None
    if len(served) != 1:
        raise ConfigError(
            f"judge {settings.shown}: the server has {len(served)} models, set the judge's `model` to one of: "
            f"{', '.join(served[:20])}"
        )
    return served[0]


def _limiter(requests_per_minute: float | None) -> Callable[[], None]:
    """A function that returns when the next request may go: evenly spaced, whichever thread asks."""
    if requests_per_minute is None:
        return lambda: None
    lock, space, next_at = threading.Lock(), 60.0 / requests_per_minute, 0.0

    def wait() -> None:
        nonlocal next_at
        with lock:
            now = time.monotonic()
            mine = max(now, next_at)
            next_at = mine + space
        time.sleep(mine - now)

    return wait
