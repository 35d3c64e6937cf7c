"""The model behind the server: opened in the background, closed when nobody asks, known by several names."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from outsize.engine.model import Model
from outsize.engine.service import Limits, Service
from outsize.errors import UnavailableError
from outsize.progress import heard
from outsize.serve.counts import Counts
from outsize.serve.errors import ApiError
from outsize.serve.options import ServeOptions

ANY = "*"  # an alias that every name matches
LOADING, READY, UNLOADED, FAILED, ENDING = "loading", "ready", "unloaded", "failed", "ending"
UNLOAD_S, WATCH_S = 5.0, 0.02  # that who asks for the close waits for others; between two looks
LOOK_S = 5.0  # between two looks at whether anybody asks
OPENING_ENDS_S = 5.0  # that a model which is being opened has to notice the end


@dataclass(frozen=True, slots=True)
class Named:
    """A model as it is asked for: `name` as the client said it, and the adapter that it stands for."""

    name: str
    adapter: str | None = None


class Host:
    """Opens a model for a server. All methods are for the event loop's thread."""

    def __init__(
        self,
        name: str,
        open_model: Callable[[], Model],
        options: ServeOptions | None = None,
        adapters: Iterable[str] = (),
    ) -> None:
        self.name, self.options = name, options or ServeOptions()
        self.adapters = tuple(adapters)
        self.created, self.counts = int(time.time()), Counts()
        self.state, self.reason = LOADING, ""
        self.progress, self.work = 0.0, "opening"  # how much of what is done
        self._open_model = open_model
        self._opening: asyncio.Future[Service] | None = None
        self._model: Model | None = None
        self._service: Service | None = None
        self._asked = time.monotonic()
        self._was_open = False
        self.context: int | None = None  # tokens, once the model was open
        self._idle: asyncio.Task[None] | None = None
        self._closing: asyncio.Future[None] | None = None
        self._tasks, self._leaving = (
            set[asyncio.Task[None]](),
            0,
        )  # requests that wait for the close
        self.failed: Exception | None = None  # why the model could not be opened at first
        self.on_failure: Callable[[], None] = lambda: None
        self.on_ready: Callable[[], None] = lambda: None  # each time that the model was opened

    def start(self) -> None:
        """Begin to open the model."""
        self._opening = self._begin()
        if self.options.idle_unload is not None:
            self._idle = asyncio.create_task(self._close_when_idle(60 * self.options.idle_unload))

    async def service(self) -> Service:
        """What answers requests; a model that was closed is opened again. Raises UnavailableError."""
        self._asked = time.monotonic()
        if self._service is not None and self.state == READY:
            return self._service
        if self.state == ENDING:
            raise UnavailableError("the server ends; it takes no more requests", 5.0)
        if not self._was_open:
            raise UnavailableError(
                f"the model is not ready yet: {self.work}, {100 * self.progress:.0f} %",
                1.0,
                self.progress,
            )
        if self._opening is None or self._opening.done():
            self._opening = self._begin()
        return await asyncio.shield(self._opening)

    @property
    def running(self) -> Service | None:
        """What answers requests, if the model is open: asking for it does not open it."""
        return self._service

    def _begin(self) -> asyncio.Future[Service]:
        """Opening, which is told to be over if nobody waits for it."""
        opening = asyncio.ensure_future(self._open())
        opening.add_done_callback(lambda done: done.cancelled() or done.exception())
        return opening

    async def _open(self) -> Service:
        """Raises UnavailableError."""
        self.state, self.work, self.progress = LOADING, "opening", 0.0
        if self._closing is not None:  # what it held is this one's memory
            await asyncio.wait({self._closing})
        try:
            with heard(self._hear):
                self._model = await self._in_thread()
        except Exception as e:
            is_ending = self.state == ENDING
            self.state, self.reason = ENDING if is_ending else FAILED, str(e)
            if not self._was_open and not is_ending:
                self.failed = e
                self.on_failure()
            raise UnavailableError(f"the model cannot be opened: {e}", 10.0) from e
        self.context = self._model.context
        self.name = self.name if self._was_open else short(self._model.name)
        self._service = Service(self._model, Limits(max_queue=self.options.max_queue))
        self.state, self._was_open, self._asked = READY, True, time.monotonic()
        self.on_ready()
        return self._service

    def _in_thread(self) -> asyncio.Future[Model]:
        """In a thread that the end of the process does not wait for."""
        loop = asyncio.get_running_loop()
        opened: asyncio.Future[Model] = loop.create_future()

        def put(made: Model | Exception) -> None:
            if opened.done():
                return
            if isinstance(made, Exception):
                opened.set_exception(made)
            else:
                opened.set_result(made)

        def work() -> None:
            try:
                made: Model | Exception = self._open_model()
            except Exception as e:
                made = e
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(put, made)

        threading.Thread(target=work, name="open", daemon=True).start()
        return opened

    def _hear(self, what: str, done: int, total: int) -> None:
        """Called by the thread that opens the model: which the end of the server breaks off here."""
        if self.state == ENDING:
            raise UnavailableError("the server ends")
        self.work, self.progress = what, done / total if total else 0.0

    async def unload(self) -> None:
        """Close the model; the next request opens it again."""
        service, model, self._service, self._model = self._service, self._model, None, None
        if service is None or model is None:
            return
        self.state = UNLOADED
        self._closing = asyncio.ensure_future(asyncio.to_thread(_close, service, model))
        await asyncio.shield(self._closing)

    async def unload_unused(self) -> None:
        """As `unload`, once the requests that are being answered have ended: which is waited for a moment."""
        self._leaving += 1
        task = asyncio.create_task(self._unload_unused())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            await asyncio.wait({task}, timeout=UNLOAD_S)
        finally:
            self._leaving -= 1

    async def _unload_unused(self) -> None:
        while self.state == READY and self.counts.in_flight > self._leaving:
            await asyncio.sleep(WATCH_S)
        if self.state == READY:
            await self.unload()

    async def _close_when_idle(self, idle_s: float) -> None:
        while True:
            await asyncio.sleep(min(LOOK_S, idle_s / 4))
            if self.counts.in_flight:
                self._asked = time.monotonic()
            elif self._service is not None and time.monotonic() - self._asked > idle_s:
                await self.unload()

    async def end(self, grace_s: float) -> None:
        """Take no more requests, let those that run end within some seconds, and close the model."""
        self.state = ENDING
        if self._idle is not None:
            self._idle.cancel()
        if self._opening is not None and not self._opening.done():
            with suppress(TimeoutError, UnavailableError):
                async with asyncio.timeout(OPENING_ENDS_S):
                    await self._opening
            self.state = ENDING
        if self._service is not None:
            await self._service.drain(grace_s)
        await self.unload()
        self.state = ENDING

    def names(self) -> list[str]:
        """Every name that a request may give, the model's own first."""
        aliases = [name for name in self.options.alias if name != ANY]
        return list(dict.fromkeys([self.name, *aliases, *self.adapters]))

    def named(self, name: str | None) -> Named:
        """The model of a name. Raises ApiError."""
        if name is None:
            return Named(self.name)
        if name in self.adapters:
            return Named(name, name)
        if name in self.names() or ANY in self.options.alias:
            return Named(name)
        known = ", ".join(self.names())
        raise ApiError(
            status=404, message=f"the model {name[:200]!r} is not known; known are {known}",
            param="model", code="model_not_found",
        )  # fmt: skip


def _close(service: Service, model: Model) -> None:
    try:
        service.close()
    finally:
        model.close()


def short(pack: str) -> str:
    """A pack's name, as its folder has it, without the hash and the encoding: what clients see."""
    return re.sub(r"-[0-9a-f]{12}-[a-z0-9]+$", "", pack)
