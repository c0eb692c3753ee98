"""An OpenAI-compatible endpoint on loopback that answers what a test tells it to."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


def completion(content, finish_reason="stop", **message):
    return {
        "id": "c1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "finish_reason": finish_reason,
                "message": {"role": "assistant", "content": content, **message},
            }
        ],
    }


class Chat:
    """What it got is in ``requests`` and ``headers``; ``answers`` are given in turn, the last one for ever."""

    def __init__(self):
        self.requests, self.headers, self.answers = [], [], [completion("It works.")]
        self.address = ""
        #: an answer of None waits for it
        self.go_on = threading.Event()

    completion = staticmethod(completion)

    def answer(self):
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.fixture
def chat(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "VITKIT_SUMMARY_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    state = Chat()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            state.requests.append((self.path, json.loads(body)))
            state.headers.append(self.headers)
            answer = state.answer()
            if answer is None:
                state.go_on.wait(30)
                return
            status, payload = answer if isinstance(answer, tuple) else (200, answer)
            text = payload if isinstance(payload, str) else json.dumps(payload)
            self.send_response(status)
            self.send_header("Content-Type", "application/json" if text.startswith("{") else "text/html")
            # a pause that no test feels
            self.send_header("Retry-After-Ms", "1")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    state.address = f"http://127.0.0.1:{server.server_port}/v1"
    yield state
    state.go_on.set()
    server.shutdown()
    server.server_close()
    thread.join()
