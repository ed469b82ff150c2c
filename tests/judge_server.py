"""A judge on a real socket of this machine: it does what a test tells it, request by request."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Act = Callable[[BaseHTTPRequestHandler], None]


def send(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: Any) -> None:
    handler.send_response(status)
    for name, value in ({"Content-Length": len(body)} | headers).items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    handler.wfile.write(body)


def says(text: str | None, usage: dict | None = None, **choice: Any) -> Act:
    """A well-formed completion; ``choice`` overrides fields of it."""
    usage = usage if usage is not None else {"prompt_tokens": 100, "completion_tokens": 10}
    message = {"role": "assistant", "content": text} | choice.pop("message", {})
    one = {"index": 0, "message": message, "finish_reason": "stop"} | choice
    body = json.dumps({"choices": [one], "usage": usage}).encode()
    return lambda handler: send(handler, body)


def status(code: int, text: str = "busy", **headers: Any) -> Act:
    return lambda handler: send(handler, text.encode(), code, **headers)


def raw(body: bytes) -> Act:
    return lambda handler: send(handler, body)


def cut(handler: BaseHTTPRequestHandler) -> None:
    """Promise a hundred bytes, send some, hang up."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


@dataclass
class Server:
    """Plays ``script`` in turn, then ``always``; keeps what it was asked."""

    always: Act = field(default_factory=lambda: says("Rating: [[7]]"))
    script: list[Act] = field(default_factory=list)
    bodies: list[dict] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    by_body: Callable[[dict], Act] | None = None
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def act(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers["Content-Length"])
        body = json.loads(handler.rfile.read(length))
        with self.lock:
            self.bodies.append({"path": handler.path} | body)
            self.headers.append({name.lower(): text for name, text in handler.headers.items()})
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            act = self.script.pop(0) if self.script else self.always
            if self.by_body is not None:
                act = self.by_body(body)
        try:
            act(handler)
        finally:
            with self.lock:
                self.at_once -= 1


@contextlib.contextmanager
def running() -> Iterator[Server]:
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            # A client that stopped waiting has hung up.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                server.act(self)

        def log_message(self, *_: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            pass

    with Quiet(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
