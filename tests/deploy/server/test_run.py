"""The server on a real socket: what test clients cannot show."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from vitkit.deploy.server import Limits, app, make_app, run
from vitkit.deploy.server.run import Server


@contextmanager
def serving(served, **limits):
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(make_app(served, Limits(**limits)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield server, listener.getsockname()[1]
    finally:
        served.go.set()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def talk(port: int, method: str, path: str, body=None, **headers) -> tuple[int, dict, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), json.loads(answer.read())
    finally:
        connection.close()


def form(data: bytes) -> dict:
    body = b'--b\r\nContent-Disposition: form-data; name="images"; filename="x.png"\r\n\r\n' + data + b"\r\n--b--\r\n"
    return {"body": body, "Content-Type": "multipart/form-data; boundary=b"}


def raw(port: int, *pieces: bytes) -> bytes:
    """What the server says to these bytes until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        for piece in pieces:
            connection.sendall(piece)
        said = b""
        while chunk := connection.recv(65536):
            said += chunk
        return said


JSON = {"Content-Type": "application/json"}
HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def test_clients_together_get_their_own_answers(served, red, blue):
    with serving(served) as (_, port), ThreadPoolExecutor(8) as pool:
        data = [red, blue] * 20
        answers = list(pool.map(lambda d: talk(port, "POST", "/predict", **form(d)), data))
    assert [a[2]["predictions"][0]["label"] for a in answers] == ["red", "blue"] * 20
    assert sum(served.batches) == 40 and max(served.batches) <= served.best_batch


@pytest.mark.parametrize("drain_s", [0.2, 0.0], ids=["at once", "after the answer"])
@pytest.mark.parametrize("size", [400_000, 5_000_000])
def test_senders_of_far_too_much_still_get_to_read_why(served, size, drain_s, monkeypatch):
    """A connection closed on a sender that is still busy is reset, and the answer is lost with it.

    Networks are slower than loopback: there the body is still coming when the answer is sent.
    """
    monkeypatch.setattr(app, "_DRAIN_S", drain_s)
    with serving(served, max_request_bytes=300_000, max_bytes=1000) as (_, port), ThreadPoolExecutor(4) as pool:
        sent = [pool.submit(talk, port, "POST", "/predict", bytes(size), **JSON) for _ in range(8)]
        for status, _, said in (one.result() for one in sent):
            assert status == 413 and "300,000" in said["error"]


def test_a_refusal_keeps_the_connection_where_it_can(served, red):
    with serving(served, max_request_bytes=300_000, max_bytes=1000) as (_, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        for data, expected in ((bytes(200_000), 413), (red, 200)):
            sent = form(data)
            connection.request("POST", "/predict", sent.pop("body"), sent)
            answer = connection.getresponse()
            assert answer.status == expected and answer.read()
            if expected == 413:
                first = connection.sock
        assert connection.sock is first is not None
        connection.close()


def test_a_body_that_never_ends_does_not_keep_its_answer_back(served):
    with serving(served, max_request_bytes=1000, max_bytes=1000) as (_, port):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(HEAD + b"Content-Length: 9999999\r\n\r\n" + bytes(5000))
            # the answer comes while the body is not complete, and says that the connection ends
            said = connection.recv(65536)
            while b"\r\n\r\n{" not in said:
                said += connection.recv(65536)
    assert said.startswith(b"HTTP/1.1 413") and b"connection: close" in said.lower()


def test_a_client_that_asks_first_need_not_send(served):
    with serving(served, max_request_bytes=1000, max_bytes=1000) as (_, port):
        said = raw(port, HEAD + b"Content-Length: 5000\r\nExpect: 100-continue\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 413") and b"1,000 bytes" in said


def test_a_slow_sender_gets_a_408(served):
    with serving(served, timeout_s=0.3) as (_, port):
        said = raw(port, HEAD + b"Content-Length: 50\r\n\r\n", b"{")
    assert said.startswith(b"HTTP/1.1 408") and b"0.3 s" in said


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"x" * 100_000,
    ],
    ids=["tls", "negative length", "two lengths", "bad chunk", "endless path"],
)
def test_what_is_no_http_is_a_400_and_harms_nobody(served, red, request_):
    with serving(served) as (_, port):
        assert raw(port, request_).startswith(b"HTTP/1.1 400")
        assert talk(port, "POST", "/predict", **form(red))[0] == 200


def test_time_is_up_for_an_answer(served, red):
    with serving(served, timeout_s=0.3) as (server, port):
        served.go.clear()
        status, headers, said = talk(port, "POST", "/predict", **form(red))
        assert status == 504 and "0.3 s" in said["error"] and "retry-after" in headers
        assert (server.batcher.open, server.batcher._places) == (0, 0)


def test_a_model_that_hangs_is_seen_by_the_probes(served, red):
    with serving(served, timeout_s=0.05) as (server, port):
        served.go.clear()
        assert talk(port, "POST", "/predict", **form(red))[0] == 504
        # far in the past, in place of waiting
        server.batcher._running_since -= 100
        assert talk(port, "GET", "/healthz")[0] == 503 and talk(port, "GET", "/readyz")[0] == 503
        served.go.set()


def test_a_full_queue_is_a_429(served, red):
    with serving(served, queue=1, max_images=1) as (_, port), ThreadPoolExecutor(1) as pool:
        served.go.clear()
        first = pool.submit(talk, port, "POST", "/predict", **form(red))
        assert served.started.wait(10)
        status, headers, said = talk(port, "POST", "/predict", **form(red))
        assert status == 429 and int(headers["retry-after"]) >= 1 and "the queue holds 1" in said["error"]
        served.go.set()
        assert first.result()[0] == 200
        assert talk(port, "POST", "/predict", **form(red))[0] == 200


def test_a_client_that_goes_away_costs_no_run(served, red):
    with serving(served) as (server, port), ThreadPoolExecutor(1) as pool:
        served.go.clear()
        first = pool.submit(talk, port, "POST", "/predict", **form(red))
        assert served.started.wait(10)
        gone = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        sent = form(red)
        gone.request("POST", "/predict", sent.pop("body"), sent)
        wait_for(lambda: server.batcher._waiting)
        gone.close()
        wait_for(lambda: not server.batcher._waiting)
        served.go.set()
        assert first.result()[0] == 200
    assert served.batches == [1]


def wait_for(condition) -> None:
    tick = threading.Event()
    for _ in range(2000):
        if condition():
            return
        tick.wait(0.005)
    raise AssertionError("it never happened")


def test_stopping_finishes_what_was_taken_and_takes_no_more(served, red):
    with serving(served) as (server, port), ThreadPoolExecutor(1) as pool:
        served.go.clear()
        first = pool.submit(talk, port, "POST", "/predict", **form(red))
        assert served.started.wait(10)
        ticks = count_ticks(server)
        server.handle_exit(signal.SIGTERM, None)
        # while one request is open it stays, however often it looks whether it may end
        wait_for(lambda: len(ticks) >= 4)
        status, headers, said = talk(port, "POST", "/predict", **form(red))
        assert status == 503 and "stopping" in said["error"] and headers["connection"] == "close"
        assert talk(port, "GET", "/readyz")[0] == 503 and talk(port, "GET", "/healthz")[0] == 200
        # a second one right after, as terminals send it to all processes, does not end it sooner
        server.handle_exit(signal.SIGTERM, None)
        assert not server.force_exit
        served.go.set()
        assert first.result()[0] == 200
        wait_for(lambda: server.should_exit)
    assert served.batches == [1]


def count_ticks(server) -> list[int]:
    """Grows whenever the server has looked whether it should end, and went on."""
    ticks, on_tick = [], server.on_tick

    async def counted(counter):
        ends = await on_tick(counter)
        if not ends:
            ticks.append(counter)
        return ends

    server.on_tick = counted
    return ticks


def test_stopping_takes_a_bounded_time(served):
    with serving(served, timeout_s=0.4) as (server, _):
        # a request that never ends, whatever the reason
        with server.batcher.request():
            server.handle_exit(signal.SIGTERM, None)
            wait_for(lambda: server.should_exit)


def test_what_could_not_be_answered_is_told(served, monkeypatch, capsys):
    def leave(self, sockets):
        self.batcher.open = 1

    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr(run, "open_served", lambda path: served)
    monkeypatch.setattr(run.Server, "run", leave)
    monkeypatch.setattr(run.os, "_exit", end)
    with pytest.raises(SystemExit) as ended:
        run.run(run.Job(Path("x"), Limits()), socket.socket())
    assert ended.value.code == 1 and "before everything was answered" in capsys.readouterr().err


def test_the_model_runs_in_the_thread_that_loaded_it(served, monkeypatch):
    threads = []

    def load(path):
        threads.append(threading.current_thread())
        return served

    def ask(self, sockets):
        async def once():
            threads.append(await self.batcher.call(threading.current_thread))
            await self.batcher.close()

        asyncio.run(once())

    monkeypatch.setattr(run, "open_served", load)
    monkeypatch.setattr(run.Server, "run", ask)
    assert run.run(run.Job(Path("x"), Limits()), socket.socket()) == 0
    assert threads[0] is threads[1] is not threading.main_thread()


def test_an_interrupted_start_does_not_wait_for_the_model(served, monkeypatch, capsys):
    def end(code):
        raise SystemExit(code)

    def load(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "open_served", load)
    monkeypatch.setattr(run.os, "_exit", end)
    with pytest.raises(SystemExit) as ended:
        run.run(run.Job(Path("x"), Limits()), socket.socket())
    assert ended.value.code == 130 and "Interrupted" in capsys.readouterr().err
