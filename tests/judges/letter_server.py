"""A server on loopback that speaks OpenAI's protocol and judges by rule."""

import contextlib
import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Prefers the longer block; `fail` answers the first so many requests with an error of that status.

    `mass`: the probability of both letters together, four fifths of it that of the longer block's. `delay`: seconds before
    an answer. `raw`: status, type and body of all answers. `schema`: ignored, followed or refused, if a request names one.
    `asked`: when, and what; `seen`: the key and the request; `most`: requests that were there at once.
    """

    def __init__(
        self, *, fail=(), key=None, models=("m",), logprobs=True, mass=1.0, delay=0.0, raw=None, schema="ignored"
    ):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.fail, self.key, self.models, self.logprobs = [], list(fail), key, models, logprobs
        self.mass, self.delay, self.raw, self.schema = mass, delay, raw, schema
        self.seen, self.here, self.most, self.lock = [], 0, 0, threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.server.models]})

    def do_POST(self):
        server = self.server
        with server.lock:
            server.here += 1
            server.most = max(server.most, server.here)
        try:
            time.sleep(server.delay)
            self.reply()
        finally:
            with server.lock:
                server.here -= 1

    def reply(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.headers["Authorization"], request))
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self.answer(401, {"error": {"message": "wrong key"}})
            return
        if self.server.raw:
            self.send(*self.server.raw)
            return
        if self.server.fail:
            self.answer(self.server.fail.pop(), {"error": {"message": "not now"}})
            return
        structured = "response_format" in request and self.server.schema
        if structured == "refused":
            self.answer(400, {"error": {"message": "response_format is unsupported"}})
            return
        text = request["messages"][0]["content"]
        self.server.asked.append((time.monotonic(), text))
        first, second = (text.split(f"<response-{name}-")[1].split("\n")[1] for name in "AB")
        letter = "A" if len(first) > len(second) else "B"
        if request["max_tokens"] == 1:
            reply = {"message": {"role": "assistant", "content": letter}}
            sure, other = (math.log(share * self.server.mass) for share in (0.8, 0.2))
            top = [
                {"token": letter, "logprob": sure},
                {"token": "B" if letter == "A" else "A", "logprob": other},
            ]
            if self.server.logprobs:
                reply["logprobs"] = {"content": [{"token": letter, "logprob": sure, "top_logprobs": top}]}
        else:
            said = "I cannot tell." if "unclear" in text else f"Both are fine. Verdict: A?\n**Verdict: {letter}**"
            if structured == "followed":
                said = json.dumps({"comparison": said, "verdict": "tie" if "unclear" in text else letter})
            reply = {"message": {"role": "assistant", "content": said}}
        usage = {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102}
        self.answer(
            200,
            {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": "m",
                "choices": [{"index": 0, "finish_reason": "stop", **reply}],
                "usage": usage,
            },
        )

    def answer(self, status, content):
        self.send(status, "application/json", json.dumps(content).encode())

    def send(self, status, kind, body):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # who asked did not wait
            self.wfile.write(body)
