"""A proxy before a real server that breaks answers on demand, and the server.

``transformers serve`` on a model folder.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SLOW = 3.0  # seconds that a request hangs


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def running(
    command: list[str], health: str, seconds: float, environment: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A server that answers at ``health``, started and stopped here."""
    process = subprocess.Popen(
        command,
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert process.poll() is None, f"{command[0]} ended with code {process.returncode}"
            try:
                with urllib.request.urlopen(health, timeout=2):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        else:
            raise AssertionError(f"{health} does not answer within {seconds} s")
        yield process
    finally:
        for how in (
            signal.SIGTERM,
            signal.SIGKILL,
        ):  # the group: an engine is a child that outlives its server
            try:
                os.killpg(process.pid, how)
                process.wait(20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The url of a real OpenAI-compatible server of a model folder."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "transformers.cli.transformers",
        "serve",
        str(folder),
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    with running(
        command,
        f"http://127.0.0.1:{port}/health",
        120,
        {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    ):
        yield f"http://127.0.0.1:{port}/v1"


class Proxy:
    """Passes requests on to ``upstream``. ``plan`` holds what happens to the next ones: a status
    code, ``hang``, ``malformed``, ``empty``, ``cut``, ``length``, or ``say TEXT``, which puts
    TEXT into the real answer, or (``finish``, REASON, TEXT), which puts another finish reason
    beside it; without a plan they pass unharmed.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream, self.plan, self.seen, self.lock = (
            upstream,
            deque[Any](),
            list[dict[str, Any]](),
            threading.Lock(),
        )
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                self.answer(None)

            def do_POST(self) -> None:
                self.answer(self.rfile.read(int(self.headers["content-length"])))

            def answer(self, body: bytes | None) -> None:
                with proxy.lock:
                    what = proxy.plan.popleft() if proxy.plan and body else "pass"
                    if body:
                        proxy.seen.append(json.loads(body))
                if isinstance(what, int):
                    return self.reply(what, b'{"error": {"message": "injected"}}')
                if what == "hang":
                    time.sleep(SLOW)
                status, content = proxy.forward(self.path.removeprefix("/v1"), body)
                if what in ("malformed", "cut"):
                    content = content[: len(content) // 2]
                elif status == 200 and what not in ("pass", "hang"):
                    content = changed(content, what)
                self.reply(status, content, cut=what == "cut")

            def reply(self, status: int, content: bytes, cut: bool = False) -> None:
                try:
                    self.send_response(status)
                    self.send_header("content-type", "application/json")
                    self.send_header("content-length", str(len(content) + 40 * cut))
                    self.end_headers()
                    self.wfile.write(content)
                    if cut:
                        self.close_connection = True
                except BrokenPipeError:
                    pass  # the client gave up

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def forward(self, path: str, body: bytes | None) -> tuple[int, bytes]:
        request = urllib.request.Request(
            self.upstream + path, body, {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()


def changed(content: bytes, what: Any) -> bytes:
    """A real answer with one thing put in its place."""
    said = json.loads(content)
    if what == "empty":
        said["choices"] = []
    elif isinstance(what, tuple):
        said["choices"][0]["finish_reason"], said["choices"][0]["message"]["content"] = what[1:]
    else:
        said["choices"][0]["finish_reason"] = "length" if what == "length" else "stop"
        if what.startswith("say "):
            said["choices"][0]["message"]["content"] = what[4:]
    return json.dumps(said).encode()
