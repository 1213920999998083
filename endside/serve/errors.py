"""Errors in the shape of OpenAI's API, each with what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from endside.errors import UserError
from endside.serve.log import event

if TYPE_CHECKING:
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer with an error status. retry_after: seconds."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        retry_after: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after


def body_of(error: ApiError) -> dict[str, Any]:
    """The JSON body of an error, also sent as an event where a stream breaks off."""
    kind = KINDS.get(error.status) or (
        "invalid_request_error" if error.status < 500 else "server_error"
    )
    found = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return {"error": found}


def response_of(error: ApiError) -> JSONResponse:
    """The same as a whole response."""
    from fastapi.responses import JSONResponse

    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body_of(error), error.status, headers)


def as_api_error(error: UserError) -> ApiError:
    """What the caller got wrong; the message has the fix."""
    return ApiError(400, str(error))


def add_to(app: FastAPI) -> None:
    """Every way a request may fail ends in the same shape."""
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    @app.exception_handler(ApiError)
    async def known(_request: Request, error: ApiError) -> JSONResponse:
        return response_of(error)

    @app.exception_handler(UserError)
    async def refused(_request: Request, error: UserError) -> JSONResponse:
        return response_of(as_api_error(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(one) for one in first["loc"] if one != "body")
        more = f" (and {len(error.errors()) - 1} more)" if len(error.errors()) > 1 else ""
        return response_of(ApiError(400, f"{place or 'body'}: {first['msg']}{more}", param=place))

    @app.exception_handler(HTTPException)
    async def plain(_request: Request, error: HTTPException) -> JSONResponse:
        return response_of(ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        event("failure", path=request.url.path, error=f"{type(error).__name__}: {error}")
        return response_of(ApiError(500, "the server failed; its log has the reason"))
