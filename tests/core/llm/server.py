"""A chat server on this machine that answers, and misbehaves as it is told to.

`server.script` holds what the next requests meet, one behaviour each; after them, and without a script, it answers well.
It remembers every request it got and how many were open at once.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behaviour = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


def completion(body: dict[str, Any], *, choices: int | None = None, usage: bool = True) -> bytes:
    """Replies that repeat the last message and the seed, so that a test sees which request each one belongs to."""
    question = body["messages"][-1]["content"]
    replies = [
        {
            "index": i,
            "message": {"role": "assistant", "content": f"{question} sample {i} seed {body.get('seed')}"},
            "finish_reason": "length" if body.get("max_tokens") == 1 else "stop",
            "logprobs": {"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -0.25}]}
            if body.get("logprobs")
            else None,
        }
        for i in range(choices or body.get("n", 1))
    ]
    # The order of the choices is the server's affair; their index counts.
    answer: dict[str, Any] = {"id": "x", "object": "chat.completion", "choices": replies[::-1]}
    if usage:
        answer["usage"] = {"prompt_tokens": len(question), "completion_tokens": 2 * len(replies)}
    return json.dumps(answer).encode()


def send(handler: BaseHTTPRequestHandler, status: int, content: bytes, **headers: str) -> None:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    handler.send_response(status)
    for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(content))} | given).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content)


def good(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    send(handler, 200, completion(body))


def few(count: int) -> Behaviour:
    """A server that ignores `n`."""
    return lambda handler, body: send(handler, 200, completion(body, choices=count))


def uncounted(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    send(handler, 200, completion(body, usage=False))


def fail(status: int, text: str = '{"error": {"message": "no"}}', **headers: str) -> Behaviour:
    return lambda handler, body: send(handler, status, text.encode(), **headers)


def slow(seconds: float) -> Behaviour:
    def behave(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        time.sleep(seconds)
        good(handler, body)

    return behave


def drip(seconds: float) -> Behaviour:
    """A byte now and then, so that no single read ever times out."""

    def behave(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        content = completion(body)
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        for byte in content:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(seconds / len(content))

    return behave


def cut(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """Half of the promised body, then silence."""
    content = completion(body)
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])
    handler.close_connection = True


def cut_chunked(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """A chunked body without its end: what came so far is whole JSON, and must not be believed."""
    content = completion(body)
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
    handler.close_connection = True


def hang_up(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    handler.close_connection = True


def body_of(content: str, **headers: str) -> Behaviour:
    """Status 200 and whatever this is."""
    return lambda handler, body: send(handler, 200, content.encode("utf-8", "surrogatepass"), **headers)


def echo_key(status: int) -> Behaviour:
    """A server that quotes the key, where an error message that is shortened to 300 characters would cut through it."""

    def behave(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        send(handler, status, f"{'x' * 278} {handler.headers['Authorization']}".encode())

    return behave


@dataclass
class ChatServer:
    url: str = ""
    script: deque[Behaviour] = field(default_factory=deque)
    default: Behaviour = good
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most_open: int = 0
    open: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def questions(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.bodies]


@contextmanager
def serving() -> Iterator[ChatServer]:
    state = ChatServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.bodies.append(body)
                state.keys.append(self.headers.get("Authorization", ""))
                state.times.append(time.monotonic())
                state.open += 1
                state.most_open = max(state.most_open, state.open)
                behave = state.script.popleft() if state.script else state.default
            try:
                if self.path == "/v1/chat/completions":
                    behave(self, body)
                else:
                    send(self, 404, b'{"error": {"message": "no such path"}}')
            except OSError:
                # The client has given up, as it should.
                self.close_connection = True
            finally:
                with state.lock:
                    state.open -= 1

        def log_message(self, *args: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

    with Quiet(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
