"""A client for load tests: HTTP/1.1 over asyncio's sockets, which notes when each event came.

No HTTP library, so that the time of an event is that of its bytes, and a request may be malformed, or left
at any moment. A connection a request; every exchange is bounded in time, and what goes wrong in it is told in
words, not raised.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from asyncio import StreamReader
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from outsize.bench.serve.events import cached_of, error_of, finish_of, is_last, text_of, usage_of
from outsize.errors import OptionError

LINE, BODY = 1 << 20, 64 << 20  # bytes of a line, and of an answer, at most
LEFT, TIMEOUT, CUT = "left", "timeout", "cut"  # of `Exchange.error`


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is."""

    host: str
    port: int
    prefix: str = ""  # before each path
    key: str = ""

    @classmethod
    def parse(cls, url: str, key: str = "") -> Address:
        """Raises OptionError."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port or 80
        except ValueError:
            host, port = None, 0
        if not host or parts.scheme != "http":
            raise OptionError(f"--url is {url!r}; one like http://127.0.0.1:8080 is expected")
        return cls(host, port, parts.path.rstrip("/").removesuffix("/v1"), key)

    def request(
        self,
        path: str,
        body: object,
        method: str = "POST",
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        """A request as it is sent; a body that is not bytes becomes JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = {
            "Host": f"{self.host}:{self.port}", "Content-Type": "application/json",
            "Content-Length": str(len(data)), "Connection": "close",
        }  # fmt: skip
        if self.key:
            head["Authorization"] = f"Bearer {self.key}"
        lines = "".join(f"{k}: {v}\r\n" for k, v in (head | dict(headers or {})).items())
        return f"{method} {self.prefix}{path} HTTP/1.1\r\n{lines}\r\n".encode() + data


@dataclass(slots=True)
class Exchange:
    """What a request got. Times are seconds since it was begun."""

    status: int = 0  # 0: no answer
    headers: dict[str, str] = field(default_factory=dict)
    head_s: float = 0.0  # until the status line
    seconds: float = 0.0  # until the end
    silence_s: float = 0.0  # the longest time without a byte, after the headers
    events: list[float] = field(default_factory=list)  # when text came
    text: str = ""
    payload: object = None  # the JSON of an answer that is not a stream
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    finish: str = ""
    ended: bool = False  # with what ends a stream of its kind
    error: str = ""  # empty: none
    began: float = 0.0  # by time.perf_counter

    @property
    def first_s(self) -> float:
        """Until the first text; not a number where there was none."""
        return self.events[0] if self.events else math.nan

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.events, self.events[1:], strict=False)]

    def note(self, data: object, now: float) -> None:
        """Take an event, or an answer that is not a stream."""
        self.error = self.error or error_of(data)
        if text := text_of(data):
            self.events.append(now)
            self.text += text
        prompt, new = usage_of(data)
        self.prompt_tokens, self.new_tokens = prompt or self.prompt_tokens, new or self.new_tokens
        self.cached_tokens = cached_of(data) or self.cached_tokens
        self.finish = finish_of(data) or self.finish
        self.ended = self.ended or is_last(data)


async def send(
    address: Address, data: bytes, limit_s: float, leave_s: float = math.inf
) -> Exchange:
    """Send a request and read its answer; after `leave_s` close the connection, whatever is on its way."""
    out = Exchange(began=time.perf_counter())
    try:
        async with asyncio.timeout(min(limit_s, leave_s)):
            await _talk(address, data, out)
    except TimeoutError:
        out.error = LEFT if leave_s < limit_s else TIMEOUT
    except ConnectionRefusedError:
        out.error = "refused"
    except ConnectionError:
        out.error = "reset"
    except EOFError:
        out.error = CUT if out.status else "closed without an answer"
    except (ValueError, asyncio.LimitOverrunError):
        out.error = "malformed answer"
    except OSError as e:
        out.error = f"{type(e).__name__}: {e.strerror}"
    out.seconds = time.perf_counter() - out.began
    return out


async def _talk(address: Address, data: bytes, out: Exchange) -> None:
    reader, writer = await asyncio.open_connection(address.host, address.port, limit=LINE)
    try:
        writer.write(data)  # not drained: a server may answer before it has read everything
        await _head(reader, out)
        await _answer(reader, out)
    finally:
        writer.transport.abort()


async def _head(reader: StreamReader, out: Exchange) -> None:
    while not out.status or out.status < 200:  # 100 Continue comes before the status
        version, status, *_ = (await _line(reader)).split(maxsplit=2)
        if not version.startswith("HTTP/1."):
            raise ValueError
        while line := await _line(reader):
            name, _, value = line.partition(":")
            out.headers[name.strip().lower()] = value.strip()
        out.status = int(status)
    out.head_s = time.perf_counter() - out.began
    if out.status >= 300:
        out.error = f"HTTP {out.status}"


async def _line(reader: StreamReader) -> str:
    """Without its end. Raises EOFError."""
    return (await reader.readuntil(b"\n")).decode("latin-1").rstrip("\r\n")


async def _answer(reader: StreamReader, out: Exchange) -> None:
    kind, last = out.headers.get("content-type", ""), out.head_s
    is_stream = "event-stream" in kind or "ndjson" in kind
    rest, size = b"", 0
    async for piece in _body(reader, out.headers):
        now = time.perf_counter() - out.began
        out.silence_s, last = max(out.silence_s, now - last), now
        rest, size = rest + piece, size + len(piece)
        if size > BODY:
            raise ValueError
        if is_stream:
            *lines, rest = rest.split(b"\n")
            for line in lines:
                _event(line.strip(), out, now)
    if is_stream:
        if not out.ended and not out.error:
            out.error = CUT
    elif kind.startswith("text/plain"):
        out.text = rest.decode(errors="replace")
    elif "json" in kind:
        out.payload = json.loads(rest)
        out.note(out.payload, last)


def _event(line: bytes, out: Exchange, now: float) -> None:
    """A line of a stream: SSE's `data:`, or an object. Comments and names of events are not of interest."""
    data = line.removeprefix(b"data:").strip()
    if data == b"[DONE]":
        out.ended = True
    elif data.startswith(b"{"):
        out.note(json.loads(data), now)


async def _body(reader: StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    """Pieces of an answer, as they come. Raises EOFError where it ends too early."""
    if "chunked" in headers.get("transfer-encoding", ""):
        while size := int((await _line(reader)).partition(";")[0], 16):
            yield await reader.readexactly(size)
            await _line(reader)
        return
    left = int(headers.get("content-length", -1))
    while left and (piece := await reader.read(left if 0 < left < LINE else LINE)):
        left -= len(piece) if left > 0 else 0
        yield piece
    if left > 0:
        raise EOFError
