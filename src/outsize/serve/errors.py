"""Errors as a client gets them: a status, and a body in the shape of the dialect that it speaks.

OpenAI     {"error": {"message", "type", "param", "code"}}
Anthropic  {"type": "error", "error": {"type", "message"}, "request_id"}
Ollama     {"error": "message"}
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from outsize.errors import (
    ClosedError,
    ContextError,
    OutsizeError,
    QueueFullError,
    UnavailableError,
    UserError,
)

OPENAI, ANTHROPIC, OLLAMA = "openai", "anthropic", "ollama"
TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    429: "rate_limit_error", 500: "server_error", 501: "not_implemented_error", 503: "unavailable_error",
}  # fmt: skip
ANTHROPIC_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 500: "api_error", 503: "overloaded_error",
}  # fmt: skip
PASSING = (408, 429, 503)  # statuses after which asking again may help


@dataclass(kw_only=True, eq=False)  # not frozen: an exception is given its traceback on its way
class ApiError(Exception):
    """A request that is refused, or an answer that broke off: what the client is told."""

    status: int
    message: str
    param: str | None = None  # the field that is wrong
    code: str | None = None
    retry_after_s: float | None = None
    progress: float | None = None  # of the model's loading, 0 to 1

    def __str__(self) -> str:
        return self.message

    @property
    def type(self) -> str:
        """OpenAI's word for the kind of error."""
        return TYPES.get(self.status, "invalid_request_error")

    def headers(self) -> dict[str, str]:
        """What SDKs look at before they ask again: they retry 408, 409, 429 and every 5xx."""
        if self.retry_after_s is not None:
            return {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}
        return {} if self.status in PASSING else {"x-should-retry": "false"}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(status=400, message=message, param=param, code=code)


def of(error: BaseException, fields: Collection[str] = ()) -> ApiError:
    """Any exception as a client is told of it. `fields`: the body's, of which an OptionError may name one."""
    if isinstance(error, ApiError):
        return error
    said = str(error)
    if isinstance(error, QueueFullError):
        return ApiError(
            status=429, message=said, code="queue_full", retry_after_s=error.retry_after_s
        )
    if isinstance(error, UnavailableError):
        return ApiError(
            status=503,
            message=said,
            code="unavailable",
            retry_after_s=error.retry_after_s,
            progress=error.progress,
        )
    if isinstance(error, ClosedError):
        return ApiError(status=503, message=said, code="unavailable", retry_after_s=1.0)
    if isinstance(error, ContextError):
        return invalid(said, code="context_length_exceeded")
    if isinstance(error, UserError):
        first = re.match(r"\w+", said)
        return invalid(said, first[0] if first and first[0] in fields else None)
    if isinstance(error, RecursionError):
        return invalid("the body is nested too deeply")
    if isinstance(error, OutsizeError):
        return ApiError(status=500, message=said)
    return ApiError(
        status=500, message=f"the server failed ({type(error).__name__}); its log says where"
    )


def dialect_of(path: str, headers: Mapping[str, str]) -> str:
    """Which dialect a request is in, by its path; /v1/models is two dialects'."""
    if path.startswith("/api/"):
        return OLLAMA
    is_theirs = path.startswith("/v1/messages") or "anthropic-version" in headers
    return ANTHROPIC if is_theirs else OPENAI


def body(error: ApiError, dialect: str, request_id: str) -> dict[str, object]:
    """An error's body in a dialect's shape."""
    if dialect == OLLAMA:
        return {"error": error.message}
    if dialect == ANTHROPIC:
        kind = ANTHROPIC_TYPES.get(error.status, "invalid_request_error")
        inner = {"type": kind, "message": error.message}
        return {"type": "error", "error": inner, "request_id": request_id}
    told: dict[str, object] = {
        "message": error.message, "type": error.type, "param": error.param, "code": error.code,
    }  # fmt: skip
    progress = {} if error.progress is None else {"progress": round(error.progress, 3)}
    return {"error": told, **progress}
