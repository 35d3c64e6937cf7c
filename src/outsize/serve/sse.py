"""Replies on their way to a client, whole or as a stream; one that has left is noticed at once, and what was
computed for it is cancelled."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from outsize.serve import errors
from outsize.serve.errors import ApiError
from outsize.serve.events import End, Event
from outsize.serve.http import Call, Gone, log_traceback
from outsize.serve.run import Run

SSE, NDJSON = "text/event-stream", "application/x-ndjson"
READ_S = 120.0  # that a client may leave what it is sent unread
COMMENT, DONE = b": working\n\n", b"data: [DONE]\n\n"


class Writer(Protocol):
    """How a dialect writes a stream. What is returned is sent as it is, and may be empty."""

    media_type: str  # SSE or NDJSON

    def start(self) -> bytes:
        """Sent at once."""
        ...

    def write(self, event: Event) -> bytes: ...

    def end(self) -> bytes:
        """After the last event."""
        ...

    def silence(self) -> bytes:
        """A sign of life, while nothing comes."""
        ...

    def failed(self, error: ApiError) -> bytes:
        """In place of the end: the reply broke off."""
        ...


def data(value: object, event: str | None = None) -> bytes:
    """One server-sent event, of JSON."""
    name = f"event: {event}\n" if event else ""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"{name}data: {text}\n\n".encode()


async def gathered(call: Call, run: Run) -> list[Event]:
    """All events of a run. Raises what broke it off, and Gone if the client left."""
    run_ends = asyncio.ensure_future(_all(call, run))
    leaves = asyncio.ensure_future(gone(call.receive))
    try:
        await asyncio.wait({run_ends, leaves}, return_when=asyncio.FIRST_COMPLETED)
        if not run_ends.done():
            raise Gone
        found = run_ends.result()
    finally:
        run.cancel()
        run_ends.cancel()
        leaves.cancel()
    return found


async def _all(call: Call, run: Run) -> list[Event]:
    found: list[Event] = []
    while more := await run.some():
        _count(call, run, more)
        found += more
    return found


async def gone(receive: Receive) -> None:
    """Returns when the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _count(call: Call, run: Run, found: list[Event]) -> None:
    """What came just now."""
    now = time.perf_counter()
    if any(not isinstance(event, End) for event in found):
        times = call.counts.first_token if call.last is None else call.counts.gap
        times.add(now - (call.last or call.started))
        call.last = now
    call.prompt_tokens = run.prompt_tokens
    call.new_tokens += sum(event.reply.new_tokens for event in found if isinstance(event, End))


class Streamed(Response):
    """A run as a dialect streams it: the headers at once, then what comes, and a sign of life after each
    `silence_s` in which nothing does."""

    def __init__(self, call: Call, run: Run, writer: Writer, silence_s: float) -> None:
        super().__init__(media_type=writer.media_type)
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"
        self._call, self._run, self._writer, self._silence_s = call, run, writer, silence_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        leaves = asyncio.ensure_future(gone(receive))
        sends = asyncio.ensure_future(self._send(send))
        try:
            await asyncio.wait({leaves, sends}, return_when=asyncio.FIRST_COMPLETED)
            if not sends.done():
                raise Gone
            sends.result()
        except Gone:
            self._call.status = 499
        finally:
            self._run.cancel()
            sends.cancel()
            leaves.cancel()

    async def _send(self, send: Send) -> None:
        head = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **head})
        body: bytes | None = self._writer.start()
        try:
            while body is not None:
                await _put(send, body, True)
                body = await self._next()
            last = self._writer.end()
        except Gone:
            raise
        except Exception as e:
            told = errors.of(e)
            if told.status == 500:
                log_traceback(e)
            self._call.error, last = told.message, self._writer.failed(told)
        await _put(send, last, False)

    async def _next(self) -> bytes | None:
        """What is to be sent next; None at the end."""
        text, until = b"", asyncio.get_running_loop().time() + self._silence_s
        while not text:
            try:
                async with asyncio.timeout_at(until):
                    found = await self._run.some()
            except TimeoutError:
                return self._writer.silence()
            if not found:
                return None
            _count(self._call, self._run, found)
            text = b"".join(self._writer.write(event) for event in found)
        return text


async def _put(send: Send, body: bytes, more: bool) -> None:
    """Raises Gone where a client does not read."""
    try:
        async with asyncio.timeout(READ_S):
            await send({"type": "http.response.body", "body": body, "more_body": more})
    except TimeoutError:
        raise Gone from None
