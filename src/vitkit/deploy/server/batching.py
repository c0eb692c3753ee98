"""One model, one thread: images of many requests run together, and what does not fit is refused at once.

The queue is a plain dict bounded by the places given out. While the model runs, images gather; when it is free it takes
up to its best batch. It waits only for images that are known to be on their way (being decoded), never for requests
that might come, so an image that finds the model idle runs immediately.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from vitkit.deploy.served import Served
from vitkit.deploy.server.limits import Limits, Refused
from vitkit.deploy.server.metrics import Metrics
from vitkit.errors import BadInput

logger = logging.getLogger("vitkit.server")

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """The model's outputs for one image.

    Attributes:
        logits, probabilities: (K,).
        wait_ms: from the queue to the model.
        model_ms: the run of its batch.
    """

    logits: np.ndarray
    probabilities: np.ndarray
    wait_ms: float
    model_ms: float


@dataclass(eq=False)
class _Waiting:
    image: np.ndarray
    future: asyncio.Future[Answer]
    since: float = field(default_factory=time.perf_counter)


class Batcher:
    """Runs a model for many requests.

    Args:
        served: the model.
        limits: ``queue``, ``max_wait_ms`` and ``timeout_s`` are read.
        metrics: where batches are counted.
        model_thread: see :func:`vitkit.deploy.server.make_app`; None starts one.
    """

    def __init__(
        self, served: Served, limits: Limits, metrics: Metrics, model_thread: ThreadPoolExecutor | None = None
    ) -> None:
        self.served, self.limits, self.metrics = served, limits, metrics
        #: no more requests are taken
        self.closing = False
        #: requests that were taken and are not answered
        self.open = 0
        self._places = 0
        self._coming = 0
        self._waiting: dict[_Waiting, None] = {}
        self._arrived = asyncio.Event()
        self._turn = asyncio.Lock()
        self._model = model_thread or ThreadPoolExecutor(1, "vitkit-model")
        decoders = min(4, os.cpu_count() or 1)
        self._decoders = ThreadPoolExecutor(decoders, "vitkit-decode")
        self._free_decoders = asyncio.Semaphore(decoders)
        self._running_since = 0.0
        self._per_second = 0.0
        self._loop: asyncio.Task[None] | None = None
        metrics.watch_waiting(lambda: self._places)

    @property
    def stuck(self) -> bool:
        """True if one run of the model takes more than twice the time a request may."""
        return bool(self._running_since) and time.perf_counter() - self._running_since > 2 * self.limits.timeout_s

    @contextmanager
    def request(self) -> Iterator[None]:
        """Take a request; a stopping server waits for its end.

        Raises: Refused with 503 if the server is stopping, with 429 if the queue is full already.
        """
        if self.closing:
            raise Refused(503, "The server is stopping; try another one.", {"Retry-After": "5", "Connection": "close"})
        if self._places >= self.limits.queue:
            raise self._full()
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1

    @contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Take places in the queue for all images of a request.

        Raises: Refused (429) if there are not so many.
        """
        if self._places + count > self.limits.queue:
            raise self._full()
        self._places += count
        try:
            yield
        finally:
            self._places -= count

    def _full(self) -> Refused:
        seconds = math.ceil(self._places / self._per_second) if self._per_second else 1
        message = f"{self._places} images are waiting, and the queue holds {self.limits.queue}; try again later."
        return Refused(429, message, {"Retry-After": str(min(60, max(1, seconds)))})

    async def decode(self, work: Callable[..., T], *args: Any) -> T:
        """Run ``work`` in one of the decoding threads, while the model may wait for it."""
        self._coming += 1
        try:
            return await self.aside(work, *args)
        finally:
            self._coming -= 1
            self._arrived.set()

    async def aside(self, work: Callable[..., T], *args: Any) -> T:
        """Run ``work`` in one of the decoding threads.

        At most one piece of work per thread is handed over: what waits can still be cancelled and leaves no trace.
        """
        await self._free_decoders.acquire()
        loop = asyncio.get_running_loop()
        try:
            job = self._decoders.submit(work, *args)
        except BaseException:
            self._free_decoders.release()
            raise
        # the thread is free when the work is done, not when nobody waits for it any more
        job.add_done_callback(lambda _: loop.call_soon_threadsafe(self._free_decoders.release))
        return await asyncio.wrap_future(job)

    async def submit(self, image: np.ndarray) -> Answer:
        """The model's outputs for one prepared image (C, H, W). Cancelling takes the image out of the queue.

        Raises: Refused (500) if the model fails.
        """
        if self._loop is None:
            self._loop = asyncio.create_task(self._serve())
        waiting = _Waiting(image, asyncio.get_running_loop().create_future())
        self._waiting[waiting] = None
        self._arrived.set()
        try:
            return await waiting.future
        finally:
            self._waiting.pop(waiting, None)

    async def call(self, work: Callable[..., T], *args: Any) -> T:
        """Run ``work`` in the model's thread, between two batches.

        Raises: Refused (500) if it fails with anything but BadInput.
        """
        async with self._turn:
            return await self._in_model_thread(work, *args)

    async def close(self) -> None:
        """Take no more requests, drop what is left and let the threads end."""
        self.closing = True
        if self._loop is not None:
            self._loop.cancel()
        for waiting in list(self._waiting):
            waiting.future.cancel()
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._model.shutdown(wait=False, cancel_futures=True)

    async def _serve(self) -> None:
        while True:
            if not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            async with self._turn:
                batch = await self._gather()
                if batch:
                    await self._run(batch)

    async def _gather(self) -> list[_Waiting]:
        deadline = asyncio.get_running_loop().time() + self.limits.max_wait_ms / 1000
        while self._coming and 0 < len(self._waiting) < self.served.best_batch:
            self._arrived.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._arrived.wait()
            except TimeoutError:
                break
        batch = list(islice(self._waiting, max(1, self.served.best_batch)))
        for waiting in batch:
            del self._waiting[waiting]
        return batch

    async def _run(self, batch: list[_Waiting]) -> None:
        started = time.perf_counter()
        try:
            logits, probabilities = await self._in_model_thread(self._forward, [w.image for w in batch])
        except (Refused, BadInput) as error:
            refused = error if isinstance(error, Refused) else Refused(500, str(error))
            for waiting in batch:
                if not waiting.future.done():
                    waiting.future.set_exception(refused)
            return
        seconds = time.perf_counter() - started
        self.metrics.batch_images.observe(len(batch))
        self.metrics.model_seconds.observe(seconds)
        rate = len(batch) / max(seconds, 1e-6)
        self._per_second = 0.8 * self._per_second + 0.2 * rate if self._per_second else rate
        for i, waiting in enumerate(batch):
            if not waiting.future.done():
                wait_ms = 1000 * (started - waiting.since)
                waiting.future.set_result(Answer(logits[i], probabilities[i], wait_ms, 1000 * seconds))

    def _forward(self, images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        logits = self.served.run(np.stack(images))
        if len(logits) != len(images):
            raise ValueError(f"the model gave {len(logits)} outputs for {len(images)} images")
        return logits, self.served.probabilities(logits)

    async def _in_model_thread(self, work: Callable[..., T], *args: Any) -> T:
        self._running_since = time.perf_counter()
        job = asyncio.get_running_loop().run_in_executor(self._model, lambda: work(*args))
        try:
            return await asyncio.shield(job)
        except asyncio.CancelledError:
            # the thread goes on; the next one in line must not be handed to it before
            await asyncio.wait([job])
            raise
        except BadInput:
            raise
        except Exception as error:
            logger.exception("the model failed")
            raise Refused(500, f"The model failed ({type(error).__name__}); the server's log says more.") from error
        finally:
            self._running_since = 0.0
