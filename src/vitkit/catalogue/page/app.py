"""The routes of the page of papers. All of them read; no path or address in a request is used."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from fastapi import FastAPI, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from vitkit import __version__
from vitkit.catalogue.describe import describe
from vitkit.catalogue.library import library_path
from vitkit.catalogue.page.shelf import Shelf, Unreadable
from vitkit.catalogue.reader import methods
from vitkit.errors import VitkitError, unknown
from vitkit.web import pages
from vitkit.web.answers import HEADERS, explain_errors, failure
from vitkit.web.listen import LOOPBACK

logger = logging.getLogger("vitkit.papers")

_ABOUT = """Papers of your library and of vitkit's catalogue. Nothing is changed by any request, and no path or address
in a request is read. Errors are JSON `{"error": "a sentence"}`."""


def make_app(library: Path | None = None, hosts: Collection[str] | None = LOOPBACK) -> FastAPI:
    """The page at ``/``, what it asks for below ``/api``, documentation at ``/docs``.

    Args:
        library: the library's file; :func:`vitkit.catalogue.library.library_path` if not given. It is only read, and
            looked at anew when it has changed.
        hosts: names that requests may call this machine by; None allows all. Others are refused, so that a page of a
            stranger cannot read the library by giving its own name this machine's address.

    Returns: an ASGI application.
    """
    path = library or library_path()
    # a library belongs to one thread
    thread = ThreadPoolExecutor(1, thread_name_prefix="papers")
    shelf: Shelf | None = None
    # two imports at once of modules that import each other may wait for each other
    importing = ThreadPoolExecutor(1, thread_name_prefix="methods")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        if shelf is not None:
            await asyncio.get_running_loop().run_in_executor(thread, shelf.close)
        for pool in (thread, importing):
            pool.shutdown(wait=False, cancel_futures=True)

    async def ask(question: Callable[[Shelf], dict[str, Any]]) -> dict[str, Any]:
        def answer() -> dict[str, Any]:
            nonlocal shelf
            if shelf is None:
                shelf = Shelf(path)
            return question(shelf)

        return await asyncio.get_running_loop().run_in_executor(thread, answer)

    app = FastAPI(
        title="vitkit papers serve",
        description=_ABOUT,
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    explain_errors(app)

    @app.exception_handler(Unreadable)
    async def unreadable(request: Request, error: Unreadable) -> Response:
        return failure(503, str(error))

    @app.middleware("http")
    async def frame(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        if hosts is not None and _host(request) not in hosts:
            answer: Response = failure(421, f"This server answers as {', '.join(hosts)} only.")
        else:
            try:
                answer = await go_on(request)
            except Exception:
                logger.exception("%s %s failed", request.method, request.url.path)
                answer = failure(500, "The server failed; its log says more.")
        for name, value in HEADERS.items():
            answer.headers.setdefault(name, value)
        return answer

    @app.get("/api/papers", responses={422: {"description": "An option has no valid value."}})
    async def papers(
        q: Annotated[str, Query(max_length=500, description="Words; empty for all papers.")] = "",
        family: Annotated[str, Query(max_length=100, description="Wing of the toolkit.")] = "",
        implemented: Annotated[
            Literal["", "yes", "no", "unlisted"],
            Query(description="`yes`: with code; `no`: in the catalogue only; `unlisted`: in your library only."),
        ] = "",
        evidence: Annotated[
            Literal["", "shown", "undecided", "not shown", "compared", "none"],
            Query(description="What our experiment says; `compared`: measured in another paper's experiment."),
        ] = "",
        section: Annotated[str, Query(max_length=1000, description="Heading in a digest.")] = "",
        sort: Annotated[
            Literal["", "best", "newest", "oldest", "title"],
            Query(description="Empty: the best first if there are words, else the newest."),
        ] = "",
        offset: Annotated[int, Query(ge=0, le=10**9, description="Papers to leave out.")] = 0,
        limit: Annotated[int, Query(ge=1, le=200, description="Papers to give.")] = 50,
    ) -> JSONResponse:
        """Papers that fit.

        `total` says how many there are, `papers` holds those from `offset` on, `facets` how many there would be with
        another family, state, evidence or section.
        """
        wanted = {"family": family, "implemented": implemented, "evidence": evidence, "section": section}
        return JSONResponse(await ask(lambda s: s.list_papers(q, wanted, sort, offset, limit)))

    @app.get("/api/papers/{paper:path}", responses={404: {"description": "There is no such paper."}})
    async def paper(paper: str) -> JSONResponse:
        """One paper by its arXiv id without version: abstract, summary, authors, versions, methods and evidence."""
        return JSONResponse(await ask(lambda s: s.paper(paper)))

    @app.get("/api/methods/{name}", responses={404: {"description": "There is no such method."}})
    async def method(name: str) -> JSONResponse:
        """How a method is used: `purpose`, and lines to copy (`study`, `python`).

        Its code is imported for that, which takes a while the first time; `problem` says why it cannot be.
        """
        if name not in methods():
            raise unknown("method", name[:80], methods(), "vitkit methods")
        return JSONResponse(await asyncio.get_running_loop().run_in_executor(importing, _usage, name))

    page = pages.read("vitkit.catalogue.page")

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page.html, headers={"Content-Security-Policy": page.policy})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        made = pages.documentation(app.openapi(), "The page")
        return HTMLResponse(made.html, headers={"Content-Security-Policy": made.policy})

    return app


def _usage(name: str) -> dict[str, Any]:
    try:
        about = describe(methods()[name])
    except VitkitError as error:
        return {"name": name, "purpose": "", "study": [], "python": [], "problem": str(error)}
    return {
        "name": name,
        "purpose": about.purpose,
        "study": list(about.study),
        "python": list(about.python),
        "problem": "",
    }


def _host(request: Request) -> str:
    """The name in the request, without its port."""
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    except ValueError:
        return ""
