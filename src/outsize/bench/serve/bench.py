"""What every load has at hand: the server, prompts of a length, its memory, and a clock that ends it."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from outsize.bench.serve.bodies import BODIES, CHAT, COMPLETIONS, Body, body_of, flatten, words
from outsize.bench.serve.client import Address, Exchange, send
from outsize.bench.serve.events import at
from outsize.bench.serve.in_process import InProcess
from outsize.bench.serve.options import ServeOptions
from outsize.bench.serve.process import POLL_S, Memory, Server, listener
from outsize.errors import UnavailableError
from outsize.progress import Progress, silent

READY_S = 600.0  # until a server has loaded its model, at most
NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?")
FEW, MANY = 4, 36  # words of two prompts whose lengths are compared


Begin = Callable[[Sequence[str]], Server]  # starts a server, with more flags


class Bench:
    """A server under test: one that `begin` starts, or the one at options.url. Open with `start`, close with
    `close`."""

    def __init__(self, options: ServeOptions, begin: Begin | None = None) -> None:
        self.options, self._begin = options, begin
        self.draw: Progress = silent
        self.in_process: InProcess | None = None
        self.random = random.Random(options.seed)
        self.address = Address("", 0)
        self.name = ""  # the model's, as the server has it
        self.memory = Memory(None)
        self._server: Server | None = None
        self._per_word, self._fixed = 1.0, 0.0  # tokens

    async def start(self, *flags: str) -> None:
        """Start the server (with more flags), or find the one that runs; learn how long its tokens are.
        Raises UnavailableError."""
        if self._begin is None:
            self.address = Address.parse(self.options.url, self.options.api_key)
        else:
            self._server = self._begin(flags)
            self.address = self._server.address
        await self._ready()
        self.memory = Memory(listener(self.address))
        listed = await self.get("/v1/models")
        self.name = str(at(listed.payload, "data", 0, "id") or "default")
        few, many = [await self._length(n) for n in (FEW, MANY)]
        self._per_word = max(0.1, (many - few) / (MANY - FEW))
        self._fixed = few - FEW * self._per_word

    async def restart(self, *flags: str) -> bool:
        """The same server anew, with more flags; False: it was not started here."""
        if self._server is None:
            return False
        self.close()
        await self.start(*flags)
        return True

    def close(self) -> int | None:
        """Stop the server, if it was started here; its exit status."""
        server, self._server = self._server, None
        return None if server is None else server.stop()

    async def _ready(self) -> None:
        end, found = time.monotonic() + READY_S, Exchange()
        while time.monotonic() < end:
            if self._server is not None:
                self._server.check()
            found = await self.get("/health")
            if found.status in (200, 404):  # not every server has it
                return
            if self._server is None and not found.status:
                break
            await asyncio.sleep(POLL_S)
        words = f"; its last words: {self._server.words()}" if self._server is not None else ""
        a = self.address
        raise UnavailableError(
            f"no server answers at {a.host}:{a.port} ({found.error}){words}; start one, or leave out --url"
        )

    async def _length(self, count: int) -> int:
        """Tokens of a prompt of so many words. Raises UnavailableError."""
        found = await self.ask(words(self.random, count), 1)
        if found.error or not found.prompt_tokens:
            why = found.error or "no usage in its answer"
            raise UnavailableError(
                f"the server does not answer a first short request: {why}: {json.dumps(found.payload)[:400]}"
            )
        return found.prompt_tokens

    def prompt(self, tokens: int) -> str:
        """A prompt of about so many tokens, unlike all before."""
        return words(self.random, max(1, round((tokens - self._fixed) / self._per_word)))

    def changes(self, new_tokens: int, more: Body | None = None) -> Body:
        """What requests have in common."""
        extra = {"ignore_eos": True} if self.options.ignore_eos else {}
        return {"max_tokens": new_tokens, "temperature": 0.0, **extra, **(more or {})}

    def request(self, path: str, prompt: Any, common: Body) -> bytes:
        """A request as it is sent."""
        body = body_of(path, prompt, {"model": self.name, "stream": True, **common})
        return self.address.request(path, body)

    async def ask(self, prompt: Any, new_tokens: int, more: Body | None = None) -> Exchange:
        """One reply, streamed; a prompt is a text, or a conversation."""
        path = CHAT if self.options.chat else COMPLETIONS
        if isinstance(prompt, list) and not self.options.chat:
            prompt = flatten(prompt)
        data = self.request(path, prompt, self.changes(new_tokens, more))
        return await send(self.address, data, self.options.limit)

    async def endpoints(self) -> list[str]:
        """Those of the ways to ask that this server has for this model."""
        out = list[str]()
        for path in BODIES:
            common = {"model": self.name, "max_tokens": 1, "temperature": 0.0, "stream": False}
            data = self.address.request(path, body_of(path, self.prompt(8), common))
            out += [path] if not (await send(self.address, data, self.options.limit)).error else []
        return out

    async def get(self, path: str) -> Exchange:
        return await send(self.address, self.address.request(path, b"", "GET"), self.options.limit)

    async def gauges(self) -> dict[str, float]:
        """What /metrics says of now, by name; empty: nothing, or not in Prometheus's format."""
        found = await self.get("/metrics")
        pairs = (line.split() for line in found.text.splitlines() if line[:1] not in ("#", ""))
        return {p[0]: float(p[1]) for p in pairs if len(p) == 2 and NUMBER.fullmatch(p[1])}

    async def crew(
        self, jobs: Sequence[Callable[[], Awaitable[Exchange]]], at_once: int, what: str
    ) -> list[Exchange]:
        """Do all, so many at once, in their order."""
        rest, made = iter(list(enumerate(jobs))), dict[int, Exchange]()

        async def worker() -> None:
            for number, job in rest:
                made[number] = await job()
                self.draw(what, len(made), len(jobs))

        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(worker())
        return [made[number] for number in sorted(made)]
