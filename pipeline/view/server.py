"""The server of `refscore view`: on loopback alone, for whoever has the address with its token, and writing nothing but votes.

A page of another site cannot ask it: a foreign Host or Origin is refused (DNS rebinding, cross-site requests), the token
stands in a cookie that other sites' requests do not carry, and nothing that a page shows can run or load anything.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from pipeline.errors import RefscoreError
from pipeline.view.answers import NoAnswer, answer, as_json, found_rows, run_here, runs_compared
from pipeline.view.ballot import cast, next_ballot, take_back

log = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
PORT = 7788
HOST = "127.0.0.1"
# bytes; a vote with a note
_LARGEST = 64 * 1024
# what a page of ours may do: run our scripts, ask this server
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
# a report holds its styles and pictures in itself, and no script
_POLICY_OF_A_REPORT = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
    "sandbox allow-popups allow-popups-to-escape-sandbox"
)


def application(token: str, port: int) -> Starlette:
    """The server's routes. `token`: what a browser must show before it gets anything."""
    return Starlette(
        routes=[
            Route("/", _page),
            Route("/data/{path:path}", _data),
            Route("/search", _search),
            Route("/compare", _compare),
            Route("/ballot", _ballot),
            Route("/votes", _vote, methods=["POST"]),
            Route("/report/{run}/", _report),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        middleware=[Middleware(_Guard, token=token, port=port)],
        exception_handlers={RefscoreError: _explained, NoAnswer: _nothing},
    )


class _Guard(BaseHTTPMiddleware):
    """Refuses what does not come from a page of this server, or without its token; sets the headers of every answer."""

    def __init__(self, app: Any, token: str, port: int) -> None:
        super().__init__(app)
        self._token, self._cookie = token, f"refscore-{port}"
        self._hosts = {f"{name}:{port}" for name in (HOST, "localhost")}

    async def dispatch(self, request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = self._refusal(request) or self._entry(request)
        if response is None:
            try:
                response = await call_next(request)
            except Exception:  # what nobody foresaw: its trace is for whoever started the server, and no page's
                log.exception("an error in refscore: please report it")
                response = PlainTextResponse("an error in refscore: the server's terminal says more\n", status_code=500)
        for name, value in (
            ("Content-Security-Policy", _POLICY),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Cross-Origin-Opener-Policy", "same-origin"),
            ("Cache-Control", "no-store"),
        ):
            response.headers.setdefault(name, value)
        return response

    def _refusal(self, request: Request) -> Response | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if host not in self._hosts:
            return _refused(f"this server answers at http://{HOST} and http://localhost with its port, not as {host!r}")
        if origin is not None and origin.removeprefix("http://") not in self._hosts:
            return _refused("a page of another site asked")
        # a link from elsewhere may open a page, as a bookmark does; nothing else of elsewhere may
        opens_a_page = request.method == "GET" and request.headers.get("sec-fetch-mode") == "navigate"
        if request.headers.get("sec-fetch-site") in ("cross-site", "same-site") and not opens_a_page:
            return _refused("a page of another site asked")
        shown = request.query_params.get("token") or request.cookies.get(self._cookie, "")
        if not secrets.compare_digest(shown.encode(), self._token.encode()):
            return _refused("open the whole address that refscore view printed, with its token")
        return None

    def _entry(self, request: Request) -> Response | None:
        """The token in an address is put into a cookie, so that it stands in no link, no history and no screenshot."""
        if "token" not in request.query_params:
            return None
        response = RedirectResponse("/", status_code=303)
        # lax: a report's link, opened from a file, is another site's, and may only open a page
        response.set_cookie(self._cookie, self._token, httponly=True, samesite="lax", path="/")
        return response


def _refused(why: str) -> Response:
    return PlainTextResponse(f"refused: {why}\n", status_code=403)


async def _page(_request: Request) -> Response:
    return Response((STATIC / "index.html").read_bytes(), media_type="text/html")


async def _data(request: Request) -> Response:
    return await _json(answer, request.path_params["path"])


async def _search(request: Request) -> Response:
    asked = request.query_params
    return await _json(found_rows, asked.get("run", ""), _number(asked.get("number")), asked.get("text", ""))


async def _compare(request: Request) -> Response:
    return await _json(runs_compared, request.query_params.getlist("run"))


async def _ballot(request: Request) -> Response:
    asked = request.query_params
    return await _json(
        lambda: next_ballot(
            run_here(asked.get("run", "")),
            asked.get("voter", ""),
            asked.get("model", ""),
            asked.get("baseline", ""),
            _number(asked.get("seed", "0")),
        )
    )


async def _vote(request: Request) -> Response:
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        return PlainTextResponse("a vote is sent as application/json\n", status_code=415)
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > _LARGEST:
            return PlainTextResponse(f"a vote holds at most {_LARGEST} bytes\n", status_code=413)
    try:
        vote = json.loads(content)
    except (ValueError, RecursionError):
        vote = None
    if not isinstance(vote, dict):
        return PlainTextResponse("a vote is a JSON object\n", status_code=400)
    run = run_here(str(vote.get("run", "")))
    return await _json(take_back if vote.get("take_back") else cast, run, vote)


async def _report(request: Request) -> Response:
    run = run_here(request.path_params["run"])
    if not run.report.is_file():
        raise NoAnswer
    response = Response(run.report.read_bytes(), media_type="text/html")
    response.headers["Content-Security-Policy"] = _POLICY_OF_A_REPORT
    return response


async def _json(make: Callable[..., Any], *given: Any) -> Response:
    # files are read and tables joined in a thread: a page that takes long stops no other
    content = await run_in_threadpool(lambda: as_json(make(*given)))
    return Response(content, media_type="application/json")


def _number(text: str | None) -> int:
    if text is None or not text.isascii() or not text.isdecimal() or len(text) > 9:
        raise NoAnswer
    return int(text)


async def _explained(_request: Request, error: Exception) -> Response:
    return Response(as_json({"problem": str(error)}), status_code=409, media_type="application/json")


async def _nothing(_request: Request, _error: Exception) -> Response:
    return Response(
        as_json({"problem": "there is nothing at this address"}), status_code=404, media_type="application/json"
    )
