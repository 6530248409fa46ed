"""A real `refscore view` process, and requests to it byte by byte as no browser would send them."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tests.conftest import ROOT


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def problem(self) -> str:
        return json.loads(self.body)["problem"]


class Served:
    """`refscore view` in `directory`, on a port that was free; `address` is what it printed."""

    def __init__(self, directory: Path, *arguments: str, port: int = 0):
        self.directory = directory
        self.process = start(directory, "--port", str(port), *arguments)
        self.address, printed = "", []
        for line in self.process.stdout:
            printed.append(line)
            if found := re.search(r"http://\S+", line):
                self.address = found[0]
                break
        assert self.address, "".join(printed)
        host, self.token = re.match(r"http://([^/]+)/\?token=([^#]+)", self.address).groups()
        self.host, self.port = host, int(host.partition(":")[2])
        self.home = f"http://{host}/"
        # the address is printed before uvicorn listens
        for _ in range(200):
            try:
                assert self.get("/").status == 200
                break
            except ConnectionRefusedError:
                time.sleep(0.05)

    def ask(self, method: str, path: str, headers: dict[str, str] | None = None, body: bytes | None = None) -> Answer:
        """One request with exactly these headers, path and body; Host, unless None is given, is the server's own."""
        headers = {"Host": self.host, **(headers or {})}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        # paths that no browser would send: NUL, spaces
        connection._encode_request = lambda request: request.encode("latin-1", "replace")
        connection._validate_path = lambda path: None
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            if value is not None:
                connection.putheader(name, value)
        if body is not None and "Content-Length" not in headers:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        found = Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        connection.close()
        return found

    @property
    def cookie(self) -> dict[str, str]:
        return {"Cookie": f"refscore-{self.port}={self.token}"}

    def get(self, path: str, **headers: str) -> Answer:
        """With the token's cookie."""
        return self.ask("GET", path, {**self.cookie, **headers})

    def post(self, content: object, **headers: str) -> Answer:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return self.ask("POST", "/votes", {**self.cookie, "Content-Type": "application/json", **headers}, body)

    def stop(self, by: signal.Signals = signal.SIGINT) -> tuple[int, str]:
        """End the process; its exit code and what else it printed."""
        if self.process.poll() is None:
            self.process.send_signal(by)
        printed = self.process.communicate(timeout=30)[0]
        return self.process.returncode, printed


def start(directory: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "stages.cli", "view", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "300"}
    return subprocess.Popen(
        command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
