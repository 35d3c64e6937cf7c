"""HTTP around a dialect's function: reads and checks the body, and turns whatever is raised into the
dialect's error. A dialect calls `post` and `get` to make its routes."""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from outsize.serve import errors, schema
from outsize.serve.counts import Counts
from outsize.serve.errors import ApiError
from outsize.serve.options import MAX_BODIES, MAX_BODY, ServeOptions

BODY_S = 60.0  # that a body has to arrive in
KEY = "outsize.call"  # of a request's scope
B = TypeVar("B", bound=schema.Body)


@dataclass(slots=True)
class Call:
    """One request on its way through the server: who asks, and what it has cost by now."""

    request: Request
    id: str = field(default_factory=lambda: f"req_{secrets.token_hex(12)}")
    started: float = field(default_factory=time.perf_counter)
    status: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    ignored: list[str] = field(default_factory=list)  # fields, with --lenient
    error: str = ""
    counts: Counts = field(default_factory=Counts)  # the server's, once it is known
    body_bytes: int = 0
    last: float | None = None  # when something of the reply came

    @property
    def dialect(self) -> str:
        return errors.dialect_of(self.request.url.path, self.request.headers)

    @property
    def receive(self) -> Receive:
        return self.request.receive


class Serving(Protocol):
    """What HTTP needs to know of the server."""

    @property
    def options(self) -> ServeOptions: ...


Handler = Callable[[Call], Awaitable[Response]]
BodyHandler = Callable[[Call, B], Awaitable[Response]]


def call_of(scope: Scope, receive: Receive) -> Call:
    """The call that a request belongs to: made once, by whoever asks first."""
    if KEY not in scope:
        scope[KEY] = Call(Request(scope, receive))
    made: Call = scope[KEY]
    made.request = Request(scope, receive)
    return made


def post(
    serving: Serving, path: str, kind: type[B], handler: BodyHandler[B], *more: str
) -> list[Route]:
    """Routes of a function that is given a checked body; `more`: other paths of the same."""

    async def with_body(call: Call) -> Response:
        raw = await body_of(call)
        body, call.ignored = schema.read(raw, kind, serving.options.lenient)
        return await handler(call, body)

    return [Route(p, Endpoint(with_body, kind), methods=["POST"]) for p in (path, *more)]


def get(path: str, handler: Handler, *more: str) -> list[Route]:
    """Routes of a function without a body."""
    return [Route(p, Endpoint(handler), methods=["GET"]) for p in (path, *more)]


class Endpoint:
    """An ASGI application of one function. What it raises becomes an answer in the dialect's shape."""

    def __init__(self, handler: Handler, kind: type[schema.Body] | None = None) -> None:
        self._handler, self.kind = handler, kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = call_of(scope, receive)
        try:
            response = await self._handler(call)
        except (ClientDisconnect, Gone):
            call.status = 499  # nobody is there to be answered
            return
        except Exception as e:
            response = failed(call, e, self.kind)
        await response(scope, receive, send)


class Gone(Exception):
    """The client has hung up."""


def failed(call: Call, error: Exception, kind: type[schema.Body] | None = None) -> Response:
    """An error as an answer, to a body of some kind. What is our fault is printed."""
    told = errors.of(error, () if kind is None else kind.model_fields)
    if told.status == 500:
        log_traceback(error)
    return refusal(call, told)


def log_traceback(error: BaseException) -> None:
    print("".join(traceback.format_exception(error)), file=sys.stderr, end="")


def refusal(call: Call, error: ApiError) -> Response:
    """An error in the dialect's shape."""
    call.error = error.message
    told = errors.body(error, call.dialect, call.id)
    return JSONResponse(told, status_code=error.status, headers=error.headers())


async def body_of(call: Call) -> bytes:
    """A JSON body. Raises ApiError, ClientDisconnect."""
    headers = call.request.headers
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        shown = f"{kind!r}" if kind else "missing"
        raise ApiError(
            status=415, message=f"the content type is {shown[:80]}; application/json is expected"
        )
    coding = headers.get("content-encoding", "identity").lower()
    if coding != "identity":
        raise ApiError(
            status=415, message=f"the body is compressed ({coding[:80]}); send it as it is"
        )
    declared = headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > MAX_BODY:
        raise _too_large()
    try:
        async with asyncio.timeout(BODY_S):
            return b"".join([chunk async for chunk in _chunks(call)])
    except TimeoutError:
        raise ApiError(
            status=408, message=f"the body did not arrive within {BODY_S:.0f} s"
        ) from None


async def _chunks(call: Call) -> AsyncIterator[bytes]:
    """Until the request has been answered, they count as memory in use."""
    size = 0
    async for chunk in call.request.stream():
        size += len(chunk)
        if size > MAX_BODY:
            raise _too_large()
        call.counts.body_bytes += len(chunk)
        call.body_bytes = size
        if call.counts.body_bytes > MAX_BODIES:
            raise ApiError(
                status=503,
                message=f"the requests that are being answered hold {MAX_BODIES >> 20} MB; ask again later",
                code="unavailable",
                retry_after_s=2.0,
            )
        yield chunk


def _too_large() -> ApiError:
    return ApiError(status=413, message=f"the body is larger than {MAX_BODY >> 20} MB")
