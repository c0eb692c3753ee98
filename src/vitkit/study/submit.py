"""Where stages run: one ``submit(fn, *args) -> Future``, in this process or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from vitkit.errors import BadInput, MissingExtra

PLACES = ("here", "ray")


class Executor(Protocol):
    """Runs functions; ``parallel`` is how many at a time are useful."""

    parallel: int

    def submit(self, fn: Callable[..., Any], *args: Any) -> Future[Any]: ...

    def wait_any(self, futures: list[Future[Any]]) -> None: ...

    def close(self) -> None: ...


class Here:
    """One after another in this process."""

    parallel = 1

    def submit(self, fn: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def wait_any(self, futures: list[Future[Any]]) -> None:
        """Nothing to wait for: submit returns finished futures."""

    def close(self) -> None:
        """Nothing to close."""


class Ray:
    """Stages as Ray tasks; every worker must see the study's folder under the same path.

    Connects to the cluster of ``RAY_ADDRESS`` when that is set, else starts a local one.
    """

    def __init__(self) -> None:
        try:
            import ray
        except ImportError as error:
            raise MissingExtra("--on ray", "ray", "ray") from error
        self._ray = ray
        self._own = not ray.is_initialized()
        if self._own:
            ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
        self.parallel = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._refs: dict[Future[Any], Any] = {}

    def submit(self, fn: Callable[..., Any], *args: Any) -> Future[Any]:
        ref = self._ray.remote(fn).options(num_cpus=1, max_retries=1).remote(*args)
        future = ref.future()
        self._refs[future] = ref
        return future

    def wait_any(self, futures: list[Future[Any]]) -> None:
        from concurrent.futures import FIRST_COMPLETED, wait

        wait(futures, return_when=FIRST_COMPLETED)

    def close(self) -> None:
        if self._own:
            self._ray.shutdown()


def executor(place: str) -> Executor:
    """The executor called ``place``: "here" or "ray"."""
    check_place(place)
    return Here() if place == "here" else Ray()


def check_place(place: str) -> None:
    """Raises: BadInput if ``place`` is not one of :data:`PLACES`."""
    if place not in PLACES:
        raise BadInput(f"Stages cannot run on {place!r}; --on takes {' or '.join(PLACES)}.")
