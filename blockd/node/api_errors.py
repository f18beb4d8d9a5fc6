"""Errors as the API tells them: `{"code", "message", "retry"}` with the status of the family."""

from __future__ import annotations

from typing import Any

from litestar import Request, Response
from litestar.exceptions import (
    HTTPException,
    MethodNotAllowedException,
    NotFoundException,
    ValidationException,
)

from blockd.node.api_types import ErrorBody
from blockd.node.context import log
from protocol.errors import BlockdError


def _answer(code: str, message: str, retry: bool, http_status: int) -> Response[ErrorBody]:
    return Response(
        ErrorBody(code=code, message=message, retry=retry),
        status_code=http_status,
        media_type="application/json",
    )


def _family_answer(_: Request[Any, Any, Any], error: BlockdError) -> Response[ErrorBody]:
    return _answer(error.code, str(error), error.retry, error.http_status)


def _http_answer(request: Request[Any, Any, Any], error: HTTPException) -> Response[ErrorBody]:
    """What the framework refuses: unknown paths, bad bodies, missing tokens."""
    message = error.detail
    if isinstance(error, ValidationException) and isinstance(error.extra, list):
        parts = [_validation_text(part) for part in error.extra]
        message = f"{request.method} {request.url.path}: {'; '.join(parts) or error.detail}"
    elif isinstance(error, NotFoundException):
        message = f"{request.url.path} does not exist; see /schema/openapi.json"
        return _answer("not_found", message, False, 404)
    elif isinstance(error, MethodNotAllowedException):
        message = f"{request.method} is not possible on {request.url.path}"
    code = "bad_request" if error.status_code < 500 else "failed"
    return _answer(code, message, False, error.status_code)


def _validation_text(part: Any) -> str:
    if isinstance(part, dict):
        words = [str(part[key]) for key in ("key", "message") if part.get(key)]
        return ": ".join(words)
    return str(part)


def _unexpected_answer(request: Request[Any, Any, Any], error: Exception) -> Response[ErrorBody]:
    log.error("%s %s: unexpected error", request.method, request.url.path, exc_info=error)
    message = "internal error; the log of the node service tells more"
    return _answer("failed", message, False, 500)


# What the application installs, most special first.
HANDLERS: dict[int | type[Exception], Any] = {
    BlockdError: _family_answer,
    HTTPException: _http_answer,
    Exception: _unexpected_answer,
}
