"""The form of answers: errors are ``{"error": "a sentence"}``, and headers forbid browsers whatever is not needed."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from vitkit.errors import BadInput, UnknownName
from vitkit.web.pages import NOTHING

#: of every answer that does not have one of its own
HEADERS = {
    "Content-Security-Policy": NOTHING,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}


def failure(status: int, message: str, headers: Any = None) -> JSONResponse:
    """An error."""
    return JSONResponse({"error": message}, status, headers)


def explain_errors(app: FastAPI) -> None:
    """One form for all errors: unknown names are 404, other bad input is 422."""

    @app.exception_handler(UnknownName)
    async def no_such_name(request: Request, error: UnknownName) -> Response:
        return failure(404, str(error))

    @app.exception_handler(BadInput)
    async def bad_input(request: Request, error: BadInput) -> Response:
        return failure(422, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return failure(422, f"{first['loc'][-1]}: {first['msg']}.")

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        path = request.url.path[:200]
        said = {
            404: f"There is nothing at {path}; /docs lists what is.",
            405: f"{path} does not take {request.method}; /docs says what it takes.",
        }
        return failure(error.status_code, said.get(error.status_code, str(error.detail)), error.headers)
