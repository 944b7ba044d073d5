"""An OpenAI-compatible server that gives scripted answers, and keeps what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any]  # status and body
MODELS = {"object": "list", "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "o"}]}


def said(text: Any = "VERDICT: safe", finish: Any = "stop", **more: Any) -> Answer:
    """A usual answer of the chat route; ``more`` are further fields of the message."""
    message = {"role": "assistant", "content": text, **more}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    usage = {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}
    return 200, {"id": "x", "object": "chat.completion", "created": 1, "model": "m"} | {
        "choices": [choice],
        "usage": usage,
    }


def failed(status: int, message: str = "", **more: Any) -> Answer:
    """An error as most servers send it."""
    return status, {"error": {"message": message, **more}}


class ScriptedServer:
    """Answers with ``answers`` in turn; the last one repeats."""

    def __init__(self, url: str, answers: Sequence[Answer | Callable[[Any], Answer]]) -> None:
        self.url = url
        self.answers = list(answers)
        self.asked: list[dict[str, Any]] = []
        self.paths: list[str] = []  # of each question
        self.lock = threading.Lock()

    def answer(self, body: dict[str, Any]) -> Answer:
        """The next answer."""
        with self.lock:
            self.asked.append(body)
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return answer(body) if callable(answer) else answer


@contextmanager
def scripted_server(*answers: Answer | Callable[[Any], Answer]) -> Iterator[ScriptedServer]:
    """A server in a thread of this process."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.reply(200, MODELS)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"] or 0)) or b"{}"
            server.paths.append(self.path)
            self.reply(*server.answer(json.loads(body)))

        def reply(self, status: int, body: Any) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = ScriptedServer(f"http://127.0.0.1:{http.server_port}/v1", answers)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
