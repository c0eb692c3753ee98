"""From a path to a running server: what is served, from which processes, and how it stops."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Any

from fastapi import FastAPI

from vitkit.data.decode import quiet
from vitkit.deploy.served import Served
from vitkit.deploy.server.app import make_app
from vitkit.deploy.server.batching import Batcher
from vitkit.deploy.server.limits import Limits
from vitkit.web import server as web

#: a second signal sooner than this is the same wish: terminals and process managers send it to all processes
_SAME_WISH_S = 1.0

_STOPPED = (0, -signal.SIGTERM, -signal.SIGINT, 130)


@dataclass(frozen=True)
class Job:
    """All that a process needs to serve; it is sent to worker processes as it is.

    Args:
        path: see :func:`open_served`.
        limits, api_key, cors: see :func:`vitkit.deploy.server.make_app`.
    """

    path: Path
    limits: Limits
    api_key: str | None = None
    cors: tuple[str, ...] = ()


def open_served(path: Path) -> Served:
    """The model of a folder: a deployed one, or one as a study exports it.

    Raises: BadInput when there is none.
    """
    if (path / "manifest.json").is_file():
        from vitkit.deploy import load

        return load(path)
    from vitkit.deploy.torch_model import TorchModel

    return TorchModel(path)


class Server(web.Server):
    """Stops in two steps: it takes no more requests, then, when all it took are answered, no more connections.

    Args:
        app: of :func:`vitkit.deploy.server.make_app`.
        announcement: printed when the server listens.
    """

    def __init__(self, app: FastAPI, announcement: str = "") -> None:
        super().__init__(app, announcement)
        self.batcher: Batcher = app.state.batcher
        self.asked_at = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: finish what was taken. Second: end now."""
        if not self.batcher.closing:
            self.batcher.closing = True
            self.asked_at = time.monotonic()
        elif time.monotonic() - self.asked_at > _SAME_WISH_S:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        if self.batcher.closing:
            late = time.monotonic() - self.asked_at > self.batcher.limits.timeout_s
            self.should_exit = self.should_exit or late or not self.batcher.open
        return await super().on_tick(counter)


def run(job: Job, listener: socket.socket, address: str = "") -> int:
    """Serve in this process until a signal comes.

    Args:
        job: what to serve.
        listener: a bound socket.
        address: to announce; "" announces nothing.

    Returns: the exit code: 0. The process ends with 1 if something it took could not be finished in time.
    """
    model_thread = ThreadPoolExecutor(1, "vitkit-model")
    try:
        served = model_thread.submit(open_served, job.path).result()
    except KeyboardInterrupt:
        # a normal exit would wait until the model is loaded
        print("Interrupted.", file=sys.stderr, flush=True)
        os._exit(130)
    app = make_app(served, job.limits, job.api_key, job.cors, model_thread)
    said = f"Serving {served.name} ({served.task}) on {address}\nThe API is described at {address}/docs. Ctrl+C stops."
    # every malformed request would be a line in the log; its sender gets the sentence, and /metrics counts it
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    with quiet():
        Server(app, said if address else "").run(sockets=[listener])
    if app.state.batcher.open:
        print("Stopped before everything was answered: the model took too long.", file=sys.stderr, flush=True)
        # the model's thread cannot be ended, and a normal exit would wait for it
        os._exit(1)
    return 0


def run_several(job: Job, listener: socket.socket, address: str, workers: int) -> int:
    """Serve from several processes on one port until a signal comes; if one of them ends by itself, all do.

    Returns: the exit code: 0, or 1 if a process failed.
    """
    spawn = get_context("spawn")
    processes = [spawn.Process(target=_work, args=(job, listener)) for _ in range(workers)]
    asked = False

    def stop(*_: Any) -> None:
        nonlocal asked
        asked = True
        for process in processes:
            if process.is_alive():
                process.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for process in processes:
            process.start()
        print(f"Serving {job.path} on {address} from {workers} processes. Ctrl+C stops.", flush=True)
        wait([process.sentinel for process in processes])
        by_itself = not asked
        if by_itself:
            stop()
        for process in processes:
            process.join()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        listener.close()
    # a process that was still loading when the signal came ends by the signal
    return int(by_itself or any(process.exitcode not in _STOPPED for process in processes))


def _work(job: Job, listener: socket.socket) -> None:
    from vitkit.cli.shell import main

    main(lambda: sys.exit(run(job, listener)))
