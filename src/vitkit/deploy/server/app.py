"""The routes of the prediction server."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar
from urllib.parse import quote

import numpy as np
from fastapi import Depends, FastAPI, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import APIKeyHeader
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vitkit import __version__
from vitkit.deploy.served import Served
from vitkit.deploy.server.batching import Answer, Batcher
from vitkit.deploy.server.heatmap import heat_png
from vitkit.deploy.server.limits import Limits, Refused
from vitkit.deploy.server.metrics import Metrics
from vitkit.deploy.server.uploads import Held, Upload, look, read_uploads
from vitkit.errors import BadInput, unknown
from vitkit.web import pages
from vitkit.web.answers import HEADERS, explain_errors, failure

logger = logging.getLogger("vitkit.server")

T = TypeVar("T")

#: seconds a refused body is read on before the answer: most are there already, and their connections can be kept
_DRAIN_S = 0.2
#: seconds it is read on after the answer: many senders look for it only when they have sent everything, and closing
#: before would take it away from them
_LINGER_S = 5.0
_GONE = 499
_KEY = APIKeyHeader(name="X-API-Key", auto_error=False)

_ABOUT = """Classes of images, and where the model looks for them. Errors are JSON `{"error": "a sentence"}`.

Images are sent as `multipart/form-data` in the field `images` (or `image`), or as JSON
`{"images": ["<base64>", …]}`. Files are told by their content, only `.npy` by its name; no path or address in a request
is ever read."""

_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["images"],
                    "properties": {"images": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            },
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["images"],
                    "properties": {"images": {"type": "array", "items": {"type": "string", "format": "byte"}}},
                }
            },
        },
    }
}
_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The body is empty or malformed."},
    401: {"description": "The key in X-API-Key is missing or wrong."},
    408: {"description": "The request came too slowly."},
    413: {"description": "The request, an image or the number of images is over its limit."},
    415: {"description": "The content type is neither multipart/form-data nor application/json."},
    422: {"description": "No image could be read, or an option has no valid value."},
    429: {"description": "The queue is full; Retry-After says when to try again."},
    503: {"description": "The server is stopping."},
    504: {"description": "The answer took too long."},
}


def make_app(
    served: Served,
    limits: Limits | None = None,
    api_key: str | None = None,
    cors: tuple[str, ...] = (),
    model_thread: ThreadPoolExecutor | None = None,
) -> FastAPI:
    """Put a model behind HTTP.

    Args:
        served: the model; it is used from one thread only.
        limits: what one request may cost.
        api_key: what ``X-API-Key`` must hold for everything but the page, its documentation and the probes; None lets
            everyone in.
        cors: origins whose pages may call the server, such as ``"https://example.org"``.
        model_thread: one thread, the one that loaded the model; None starts one. Every thread that PyTorch has computed
            in keeps helpers of its own, and with more of them than cores none waits awake: a fifth of the model's time.

    Returns: an ASGI application; ``app.state.batcher`` is its :class:`~vitkit.deploy.server.batching.Batcher`.
    """
    limits = limits or Limits()
    metrics = Metrics()
    batcher = Batcher(served, limits, metrics, model_thread)
    held = Held(limits.max_held_bytes)
    labels = served.labels

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await batcher.close()

    app = FastAPI(
        title=f"vitkit serve: {served.name}",
        description=_ABOUT,
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.batcher = batcher
    app.add_middleware(_Frame, metrics=metrics)
    if cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors),
            allow_methods=["GET", "POST"],
            allow_headers=["X-API-Key", "Content-Type"],
            expose_headers=["X-Target", "Retry-After"],
        )
    _explain_errors(app)
    guarded = [Depends(_key_check(api_key))] if api_key is not None else []

    async def prepared(upload: Upload) -> np.ndarray:
        """Raises: BadInput."""
        return await batcher.decode(_prepare, served, upload, limits.max_pixels)

    async def predicted(upload: Upload) -> tuple[Answer, float]:
        """Raises: BadInput."""
        started = time.perf_counter()
        image = await prepared(upload)
        decoded_ms = 1000 * (time.perf_counter() - started)
        return await batcher.submit(image), decoded_ms

    @app.post("/predict", dependencies=guarded, openapi_extra=_BODY, responses=_REFUSALS)
    async def predict(
        request: Request,
        top: Annotated[int, Query(ge=1, description="Number of classes to name, most probable first.")] = 5,
    ) -> Response:
        """Label images.

        One row an image, in their order: `image` (its name) with `label` and `probabilities`, with `values` where the
        model predicts numbers, or with `error` where the image could not be read. The status is 200 if any image could
        be read, else 422.
        """
        started = time.perf_counter()
        with batcher.request(), held.meter() as meter:
            uploads = await read_uploads(request, limits, meter)
            read_ms = 1000 * (time.perf_counter() - started)
            with batcher.places(len(uploads)):
                work = asyncio.gather(*(predicted(u) for u in uploads), return_exceptions=True)
                found = await _until(request, work, limits.timeout_s)
        rows: list[dict[str, Any]] = []
        times: list[tuple[float, float, float]] = []
        for upload, result in zip(uploads, found):
            if isinstance(result, BadInput):
                metrics.images.labels("unreadable").inc()
                rows.append({"image": upload.name, "error": str(result)})
                continue
            if isinstance(result, BaseException):
                raise result
            metrics.images.labels("ok").inc()
            answer, decoded_ms = result
            rows.append({"image": upload.name, **_row(answer.probabilities, labels, served.task, top)})
            times.append((decoded_ms, answer.wait_ms, answer.model_ms))
        slowest = [max(column) for column in zip(*times)] if times else [0.0, 0.0, 0.0]
        total_ms = 1000 * (time.perf_counter() - started)
        stages = zip(("read", "decode", "wait", "model", "total"), (read_ms, *slowest, total_ms))
        content: dict[str, Any] = {
            "predictions": rows,
            "model": served.name,
            "latency_ms": {stage: round(ms, 3) for stage, ms in stages},
        }
        if not times:
            first = rows[0]["error"]
            error = first if len(rows) == 1 else f"None of the {len(rows)} images could be read, to begin with {first}"
            return JSONResponse({"error": error, **content}, 422)
        return JSONResponse(content)

    @app.post(
        "/explain",
        dependencies=guarded,
        openapi_extra=_BODY,
        response_class=Response,
        responses={
            **_REFUSALS,
            200: {
                "description": "The heat map; X-Target is the output it is about (percent-encoded).",
                "content": {"image/png": {}},
            },
            404: {"description": "The model has no such heat-map method or no such output."},
            501: {"description": "The model has no heat maps at all."},
        },
    )
    async def explain(
        request: Request,
        method: Annotated[str, Query(description="Name of the method; /model lists them.")],
        target: Annotated[
            str | None, Query(description="Label or index of the output to explain; else the predicted one.")
        ] = None,
        overlay: Annotated[bool, Query(description="Draw the map in colour over the image.")] = False,
    ) -> Response:
        """A heat map of one image as PNG.

        Alone it is grey and has the size of the model's input, black is 0 and white 1; with `overlay=true` it lies over
        the image as the model sees it.
        """
        if not served.explainers:
            raise Refused(501, f"{served.name} has no heat maps; serve the model's own folder, which has, instead.")
        if method not in served.explainers:
            raise unknown("heat-map method", method, served.explainers, "GET /model")

        async def draw(upload: Upload) -> tuple[bytes, str]:
            image = await prepared(upload)
            names = labels
            if target is None or not names:
                logits = (await batcher.submit(image)).logits
                names = names or tuple(str(i) for i in range(len(logits)))
            index = int(np.argmax(logits)) if target is None else _index(target, names)
            heat = await batcher.call(served.explain, image, method, index)
            return await batcher.aside(heat_png, heat, image if overlay else None), names[index]

        with batcher.request(), held.meter() as meter:
            uploads = await read_uploads(request, limits, meter)
            if len(uploads) != 1:
                raise Refused(400, f"The request holds {len(uploads)} images; /explain takes one at a time.")
            with batcher.places(1):
                png, named = await _until(request, draw(uploads[0]), limits.timeout_s)
        return Response(png, media_type="image/png", headers={"X-Target": quote(named)})

    @app.get("/model", dependencies=guarded)
    async def model() -> dict[str, Any]:
        """What is served: name, task, labels, heat-map methods, limits and facts of the engine."""
        return {
            "name": served.name,
            "task": served.task,
            "labels": list(labels),
            "explainers": list(served.explainers),
            "best_batch": served.best_batch,
            "facts": served.describe(),
            "limits": vars(limits),
        }

    @app.get("/healthz", responses={503: {"description": "The model hangs; start the server anew."}})
    async def healthz() -> dict[str, str]:
        """Whether the process lives. Needs no key."""
        if batcher.stuck:
            raise Refused(503, f"The model has been running for more than {2 * limits.timeout_s:g} s.")
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"description": "The server is stopping, or the model hangs."}})
    async def readyz() -> dict[str, str]:
        """Whether new requests are taken. Needs no key."""
        if batcher.closing or batcher.stuck:
            raise Refused(503, "The server is stopping." if batcher.closing else "The model hangs.")
        return {"status": "ready"}

    @app.get("/metrics", dependencies=guarded, response_class=Response)
    async def numbers() -> Response:
        """Counters and times in Prometheus' text format, of this process."""
        return Response(metrics.text(), headers={"Content-Type": metrics.content_type})

    page = pages.read("vitkit.deploy.server")

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page.html, headers={"Content-Security-Policy": page.policy})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        made = pages.documentation(app.openapi(), "Try it")
        return HTMLResponse(made.html, headers={"Content-Security-Policy": made.policy})

    return app


def _prepare(served: Served, upload: Upload, max_pixels: int) -> np.ndarray:
    look(upload, max_pixels)
    image = served.prepare(upload.data, upload.name)
    if not np.isfinite(image).all():
        raise BadInput(f"{upload.name} cannot be used: its pixels are too large to be scaled.")
    return image


def _row(probabilities: np.ndarray, labels: tuple[str, ...], task: str, top: int) -> dict[str, Any]:
    """Outputs (K,) of one image in words."""
    if not np.isfinite(probabilities).all():
        raise Refused(500, "The model gave an answer that is no number.")
    values = [float(v) for v in probabilities]
    names = labels or tuple(str(i) for i in range(len(values)))
    if task == "regress":
        return {"values": dict(zip(names, values))}
    order = np.argsort(-probabilities, kind="stable")
    best = {names[i]: round(values[i], 6) for i in order[:top]}
    if task == "multilabel":
        return {"label": [names[i] for i in order if values[i] > 0.5], "probabilities": best}
    return {"label": names[order[0]], "probabilities": best}


def _index(target: str, labels: tuple[str, ...]) -> int:
    """Index of the output called ``target``, or given by its number.

    Raises: UnknownName.
    """
    if target in labels:
        return labels.index(target)
    if target.isascii() and target.isdigit() and len(target) < 10 and int(target) < len(labels):
        return int(target)
    raise unknown("output of the model", target[:80], labels, "GET /model")


async def _until(request: Request, work: Coroutine[Any, Any, T] | asyncio.Future[T], seconds: float) -> T:
    """Wait for ``work``, but not longer than ``seconds`` nor for a client that has gone; then it is cancelled.

    Raises: Refused (504) when time is up; ClientDisconnect.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientDisconnect
        raise Refused(504, f"The answer was not ready after {seconds:g} s; try again later.", {"Retry-After": "5"})
    finally:
        task.cancel()
        gone.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _key_check(api_key: str) -> Any:
    expected = api_key.encode()

    async def check(given: Annotated[str | None, Depends(_KEY)]) -> None:
        if given is None or not hmac.compare_digest(given.encode("latin-1"), expected):
            what = "is missing" if given is None else "is wrong"
            raise Refused(401, f"The key in the header X-API-Key {what}.", {"WWW-Authenticate": "ApiKey"})

    return check


def _explain_errors(app: FastAPI) -> None:
    """What only this server knows; the rest is :func:`vitkit.web.answers.explain_errors`."""
    explain_errors(app)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return failure(error.status, error.message, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return failure(_GONE, "The client has gone.")


class _Frame:
    """What holds for every answer: headers, counting, errors nobody caught, and a body that was not read to its end."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        unread, begun, status = True, False, 500
        asks_first = any(name == b"expect" for name, _ in scope["headers"])

        async def watched() -> Message:
            nonlocal unread
            message = await receive()
            unread = message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def framed(message: Message) -> None:
            nonlocal begun, status
            if message["type"] == "http.response.start":
                begun, status = True, message["status"]
            # who asks before sending sends nothing after a refusal, and who was too slow has had the time
            patient = status != 408 and not asks_first
            if message["type"] == "http.response.start":
                headers = message["headers"] = list(message.get("headers", ()))
                if unread and patient:
                    await _drain(watched, _DRAIN_S)
                if unread:
                    headers.append((b"connection", b"close"))
                headers += _headers(headers)
            elif message["type"] == "http.response.body" and not message.get("more_body") and unread and patient:
                await send({**message, "more_body": True})
                await _drain(watched, _LINGER_S)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        try:
            await self.app(scope, watched, framed)
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if begun:
                raise
            answer = failure(500, "The server failed; its log says more.")
            await answer(scope, watched, framed)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")
            method = scope["method"] if scope["method"] in ("GET", "POST", "OPTIONS", "HEAD") else "other"
            self.metrics.requests.labels(path, method, status).inc()
            self.metrics.request_seconds.labels(path).observe(time.perf_counter() - started)


async def _drain(receive: Receive, seconds: float) -> None:
    """Read a body on and forget it."""
    try:
        async with asyncio.timeout(seconds):
            while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                pass
    except TimeoutError:
        return


def _headers(given: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    names = {name.lower() for name, _ in given}
    return [(name.encode(), value.encode()) for name, value in HEADERS.items() if name.lower().encode() not in names]
