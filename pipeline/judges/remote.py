"""`llm:<url>`: a judge behind a server that speaks OpenAI's protocol (vLLM, SGLang, llama.cpp, OpenAI and others).

Every verdict is kept as it comes, so a killed evaluation goes on where it stopped. The key is read from the environment,
sent to that server only, and written nowhere.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipeline.config.judges import JudgeConfig
from pipeline.config.rubrics import read_rubric
from pipeline.errors import ConfigError, RefscoreError, first_line
from pipeline.judges.asking.completions import UnreadableReply, verdict_of
from pipeline.judges.asking.prompts import question, wording
from pipeline.judges.asking.structured import Form
from pipeline.judges.asking.verdicts import read_verdict
from pipeline.judges.judging import Duel, Judge
from pipeline.judges.memory import Verdict, Verdicts, verdict_key
from pipeline.progress import SILENT, Listener, Ticker

if TYPE_CHECKING:
    from openai import OpenAI

log = logging.getLogger(__name__)

_TOP = 20
# so many failures in a row mean that nobody is there, or nobody who could judge
_GIVE_UP = 8
# of English text a token has four and more, of most others fewer
_BYTES_OF_A_TOKEN = 3


def open_remote(settings: JudgeConfig, verdicts: Verdicts, listener: Listener = SILENT) -> Judge:
    """The judge at `settings.argument`. Nothing is sent before the first duel that `verdicts` does not know."""
    asked: list[str] = []
    form = Form(settings.shown, lambda error: _reason(error, settings), as_json=settings.verdict == "reasoning")
    rubric = read_rubric(settings.rubric) if settings.rubric else None
    read = None if settings.verdict == "token" else read_verdict
    how = f"token {settings.min_mass}" if settings.verdict == "token" else f"reasoning {settings.max_tokens}"

    @cache
    def model() -> str:
        return settings.model or _only_model(settings)

    def keys_of(duels: Sequence[Duel]) -> list[str]:
        identity = f"{settings.argument} {model()} {how} {wording(rubric)}"
        return [verdict_key(identity, (duel.prompt.text, duel.first.text, duel.second.text)) for duel in duels]

    def prefer(duels: Sequence[Duel]) -> list[float | None]:
        keys = keys_of(duels)
        asked.extend(keys)

        def ask(missing: dict[str, Duel]) -> None:
            turns = {key: question(duel, settings.verdict, rubric) for key, duel in missing.items()}
            _forecast(settings, turns, cost()["price"])
            with listener.progress(f"{settings.shown} judges", len(turns)) as ticker:
                _ask_all(settings, model(), form, turns, verdicts, ticker)

        return verdicts.values(keys, duels, ask, read)

    def cost() -> dict[str, float]:
        answered = [verdict for key in dict.fromkeys(asked) if (verdict := verdicts.get(key))]
        tokens_in, tokens_out = (
            sum(getattr(reply, name) for reply in answered) for name in ("tokens_in", "tokens_out")
        )
        price = _price(settings, tokens_in, tokens_out)
        return {"requests": len(answered), "tokens_in": tokens_in, "tokens_out": tokens_out, "price": price}

    return Judge(settings.shown, prefer, cost=cost, words=lambda duels: verdicts.words(keys_of(duels)))


def _forecast(settings: JudgeConfig, turns: dict[str, str], spent: float) -> None:
    """Says what asking may cost. Raises ConfigError if that and what is `spent` are more than the judge may cost."""
    tokens_in = sum(len(turn.encode()) for turn in turns.values()) // _BYTES_OF_A_TOKEN
    tokens_out = len(turns) * (1 if settings.verdict == "token" else settings.max_tokens)
    price = _price(settings, tokens_in, tokens_out)
    forecast = (
        f"{len(turns)} requests, about {tokens_in} prompt tokens, at most {tokens_out} generated tokens, "
        f"price about {price:.2f}"
    )
    log.info("judge %s: %s", settings.shown, forecast)
    if settings.max_cost is not None and spent + price > settings.max_cost:
        raise ConfigError(
            f"judge {settings.shown}: {forecast}, with {spent:.2f} spent before: more than its max_cost of "
            f"{settings.max_cost:g}. Nothing was asked. Raise max_cost, or evaluate fewer prompts or samples"
        )


def _price(settings: JudgeConfig, tokens_in: int, tokens_out: int) -> float:
    return (tokens_in * settings.price_in + tokens_out * settings.price_out) / 1e6


def _ask_all(
    settings: JudgeConfig, model: str, form: Form, turns: dict[str, str], verdicts: Verdicts, ticker: Ticker
) -> None:
    import openai

    client = _client(settings, _limiter(settings.requests_per_minute))
    reasons: dict[str, int] = {}
    in_a_row = 0
    pool = ThreadPoolExecutor(settings.concurrency)
    try:
        futures = {
            pool.submit(lambda key, turn: verdicts.add(key, _ask(client, settings, model, form, turn)), key, turn): key
            for key, turn in turns.items()
        }
        for done in as_completed(futures):
            error = done.exception()
            if error is None:
                in_a_row = 0
                ticker.advance(1, _failures(reasons))
                continue
            if not isinstance(error, openai.APIError | UnreadableReply):
                raise error
            # failed after its retries: counted as a failure, asked again by the next evaluation
            reason = _reason(error, settings)
            if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError | openai.NotFoundError):
                raise ConfigError(
                    f"judge {settings.shown}: the server refuses ({reason}). The key is read from the "
                    f"environment variable {settings.key_env}, the model is {model!r}"
                )
            verdicts.add_failure(futures[done], reason)
            if reason not in reasons:
                log.warning("judge %s: %s", settings.shown, reason)
            reasons[reason] = reasons.get(reason, 0) + 1
            ticker.advance(1, _failures(reasons))
            in_a_row += 1
            if in_a_row >= _GIVE_UP and (isinstance(error, openai.APIConnectionError) or not len(verdicts)):
                raise RefscoreError(_given_up(error, reason, settings, verdicts))
    finally:
        pool.shutdown(cancel_futures=True)
    if reasons:
        log.warning(
            "judge %s: %d of %d requests failed, most because: %s. The same command asks them again",
            settings.shown, sum(reasons.values()), len(turns), max(reasons, key=lambda reason: reasons[reason]),
        )  # fmt: skip


def _failures(reasons: dict[str, int]) -> str:
    return f"{sum(reasons.values())} failed"


def _given_up(error: BaseException, reason: str, settings: JudgeConfig, verdicts: Verdicts) -> str:
    import openai

    what = "gives no verdict"
    if isinstance(error, openai.APIConnectionError):
        what = "is too slow" if isinstance(error, openai.APITimeoutError) else "cannot be reached"
    return (
        f"judge {settings.shown}: {settings.argument} {what} ({reason}). Verdicts given so far are kept in "
        f"{verdicts.path}: the same command goes on from there"
    )


def _reason(error: BaseException, settings: JudgeConfig) -> str:
    import openai

    if isinstance(error, openai.APITimeoutError):
        return f"timeout: no answer within {settings.timeout:g} seconds, the judge's `timeout`"
    # a server may repeat the key that it was sent
    key = os.environ.get(settings.key_env, "")
    text = str(error).replace(key, "<key>") if key else str(error)
    return first_line(Exception(text or type(error).__name__))


def _ask(client: OpenAI, settings: JudgeConfig, model: str, form: Form, turn: str) -> Verdict:
    how: dict[str, Any] = (
        {"max_tokens": 1, "logprobs": True, "top_logprobs": _TOP}
        if settings.verdict == "token"
        else {"max_tokens": settings.max_tokens}
    )
    messages: Any = [{"role": "user", "content": turn}]
    create = client.chat.completions.with_raw_response.create
    raw = form.answer(lambda said: create(model=model, messages=messages, temperature=0.0, **how, **said))
    return verdict_of(raw.http_response.content, settings)


def _client(settings: JudgeConfig, wait: Callable[[], None] = lambda: None) -> OpenAI:
    from openai import DefaultHttpxClient, OpenAI

    key = os.environ.get(settings.key_env, "")
    parts = urlsplit(settings.argument)
    if key and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise ConfigError(
            f"judge {settings.shown}: {settings.key_env} is set, but over http:// the key would travel unencrypted: "
            "use https://, or unset it if the server wants none"
        )
    return OpenAI(
        base_url=settings.argument,
        api_key=key or "none",
        max_retries=settings.retries,
        timeout=settings.timeout,
        # before every request on the wire, so that a further try counts too
        http_client=DefaultHttpxClient(event_hooks={"request": [lambda _: wait()]}),
    )


def _only_model(settings: JudgeConfig) -> str:
    import openai

    try:
        content = _client(settings).models.with_raw_response.list().http_response.content
        served = [str(model["id"]) for model in json.loads(content.decode("utf-8", "replace"))["data"]]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ConfigError(
            f"judge {settings.shown}: {settings.argument}/models answers with no list of models: set the judge's `model`"
        ) from None
    except openai.OpenAIError as error:
        raise RefscoreError(
            f"judge {settings.shown}: {settings.argument}/models does not answer ({_reason(error, settings)}). "
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
