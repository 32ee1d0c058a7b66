"""A server on this machine that speaks OpenAI's chat protocol, and fails as it is told to.

    with serving(lambda body: "m", faults=[status(500), None, cut]) as server:
        Endpoint("judge", server.url)

`answer(body)` gets a request's JSON and returns a text or a `Said`. `faults` are taken one a request, in the order of
arrival; None and the end of the list answer as they should. Errors repeat the request's key and messages, as some
servers do.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Said:
    """A reply; `top_logprobs` is a mapping from token to log-prob for each token, given where it was asked for."""

    text: str | None
    top_logprobs: Sequence[Mapping[str, float]] | None = None
    finish_reason: str = "stop"


@dataclass
class Server:
    """What one looks at from a test."""

    url: str = ""
    requests: list[Body] = field(default_factory=list)  # bodies, in the order of arrival, failed ones included
    keys: list[str | None] = field(default_factory=list)  # what each request's Authorization held
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # seconds, of a clock that starts anywhere
    under_way: int = 0
    most_under_way: int = 0


Respond = Callable[[int, bytes, Mapping[str, str]], None]
Fault = Callable[[Body, str | None, Respond], None]


def status(code: int, word: str | None = None, *, wait_s: float = 0.01, **headers: str) -> Fault:
    """An HTTP error; `wait_s` goes into Retry-After in milliseconds, so that retries are quick."""

    def fail(body: Body, key: str | None, respond: Respond) -> None:
        error = {"message": f"no, {key}: {json.dumps(body['messages'])}", "code": word, "type": None}
        waiting = {"Retry-After-Ms": str(1000 * wait_s)} if code >= 429 or code == 408 else {}
        respond(
            code, json.dumps({"error": error}).encode(), waiting | {k.replace("_", "-"): v for k, v in headers.items()}
        )

    return fail


def slow(seconds: float) -> Fault:
    """Silence, and then a reply that is too late for whoever waits for less."""

    def wait(body: Body, key: str | None, respond: Respond) -> None:
        time.sleep(seconds)
        respond(200, _completion(body, Said("late")), {})

    return wait


def malformed(body: Body, key: str | None, respond: Respond) -> None:
    """A body that ends within its JSON."""
    respond(200, _completion(body, Said("half"))[:-20], {})


def no_choices(body: Body, key: str | None, respond: Respond) -> None:
    """A completion with nothing in it."""
    respond(200, json.dumps({"object": "chat.completion", "model": body["model"], "choices": []}).encode(), {})


def a_page(body: Body, key: str | None, respond: Respond) -> None:
    """What a proxy says in the place of the server."""
    respond(200, b"<html>Welcome</html>", {"Content-Type": "text/html"})


def cut(body: Body, key: str | None, respond: Respond) -> None:
    """The connection ends within the body."""
    content = _completion(body, Said("cut"))
    respond(200, content[:40], {"Content-Length": str(len(content))})


def _completion(body: Body, said: Said) -> bytes:
    choice: Body = {
        "index": 0,
        "message": {"role": "assistant", "content": said.text},
        "finish_reason": said.finish_reason,
    }
    if body.get("logprobs") and said.top_logprobs is not None:
        tokens = [
            [{"token": token, "logprob": value, "bytes": list(token.encode())} for token, value in top.items()]
            for top in said.top_logprobs
        ]
        choice["logprobs"] = {
            "content": [{**max(top, key=lambda t: t["logprob"]), "top_logprobs": top} for top in tokens]
        }
    read, written = len(json.dumps(body["messages"])) // 4, len((said.text or "").split())
    usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    record = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
    return json.dumps(record | {"usage": usage}).encode()


@contextmanager
def serving(
    answer: Callable[[Body], str | Said] = lambda body: body["messages"][-1]["content"].upper(),
    *,
    faults: Iterable[Fault | None] = (),
    key: str | None = None,
    models: Sequence[str] | None = None,
) -> Iterator[Server]:
    """The server, as long as the block runs. Requests with another `key` get 401, for other `models` 404."""
    server, script, lock = Server(), iter(faults), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            sent = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            with lock:
                server.requests.append(body)
                server.keys.append(sent)
                server.headers.append(dict(self.headers))
                server.times.append(time.monotonic())
                server.under_way += 1
                server.most_under_way = max(server.most_under_way, server.under_way)
                fault = next(script, None)
            try:
                self._act(body, sent, fault)
            finally:
                with lock:
                    server.under_way -= 1

        def _act(self, body: Body, sent: str | None, fault: Fault | None) -> None:
            if key is not None and sent != key:
                fault = status(401, "invalid_api_key")
            elif self.path != "/v1/chat/completions" or (models is not None and body["model"] not in models):
                fault = status(404, "model_not_found")
            if fault is not None:
                return fault(body, sent, self._respond)
            said = answer(body)
            self._respond(200, _completion(body, Said(said) if isinstance(said, str) else said), {})

        def _respond(self, code: int, content: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(code)
            for name, value in (
                {"Content-Type": "application/json", "Content-Length": str(len(content))} | headers
            ).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
            self.close_connection = headers.get("Content-Length") is not None

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: the tests look at `requests`."""

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that went away while the answer was slow."""

    http = Quiet(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
