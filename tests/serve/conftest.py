"""A real server in this process, at a free port, with a tiny model behind it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx
import pytest

import outsize
from outsize.engine.model import Model
from outsize.engine.service import Load
from outsize.serve import server
from outsize.serve.host import READY, Host
from outsize.serve.options import ServeOptions
from tests.golden import tiny as tiny_models

OPTIONS = ServeOptions(port=0)
PATIENCE_S = 30.0
ENDLESS = 100_000  # tokens of context


class Running:
    """A server that runs in a thread of its own."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.socket = server.bind(host.options)
        self.url = server.url(self.socket)
        self._thread = threading.Thread(target=self._run, name="server")
        self._begun = threading.Event()
        self._thread.start()
        self._begun.wait(PATIENCE_S)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self.loop, self.server = asyncio.get_running_loop(), server.Server(self.host)
        self._begun.set()
        await self.server.serve([self.socket])

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.socket.getsockname()[:2]
        return host, port

    def load(self) -> Load:
        """How busy the engine is."""
        service = self.host.running
        return Load() if service is None else service.load()

    def until(self, is_so: Callable[[], bool], what: str) -> None:
        """Wait for something that is about to be. Fails if it does not come to pass."""
        end = time.monotonic() + PATIENCE_S
        while not is_so():
            assert time.monotonic() < end, what
            time.sleep(0.002)

    def until_ready(self) -> Running:
        self.until(lambda: self.host.state == READY or not self._thread.is_alive(), "ready")
        return self

    def call(self, function: Callable[[], object]) -> None:
        """Do something in the server's thread."""
        self.loop.call_soon_threadsafe(function)

    def end(self) -> None:
        """As a signal does."""
        if self._thread.is_alive():
            self.call(self.server.end)
        self.join()

    def join(self) -> None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the server ends"

    def client(self, **more: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE_S, trust_env=False, **more)  # type: ignore[arg-type]


Serving = Callable[..., Running]


@contextmanager
def serving(
    open_model: Callable[[], Model], options: ServeOptions, adapters: Iterable[str] = ()
) -> Iterator[Running]:
    """A server, which begins to open its model."""
    running = Running(Host("tiny", open_model, options, adapters))
    try:
        yield running
    finally:
        running.end()


@pytest.fixture(scope="session")
def tiny(folder_of: Callable[[str], Path], home: Path) -> Callable[[], Model]:
    """What opens a tiny model."""
    return partial(outsize.load, str(folder_of("llama")), quiet=True, streams=8, grammars=True)


@pytest.fixture(scope="session")
def served(tiny: Callable[[], Model]) -> Iterator[Running]:
    """One server for the tests that change nothing about it."""
    with serving(tiny, replace(OPTIONS, grace=0.0, alias=("other",))) as running:
        yield running.until_ready()


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Callable[[], Model]:
    """What opens a tiny model of a context so long that no reply ends by itself while a test runs."""
    folder = tiny_models.write_folder(tmp_path_factory.mktemp("endless") / "llama", "llama")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**settings, "max_position_embeddings": ENDLESS})
    )
    return partial(outsize.load, str(folder), quiet=True, streams=4)


@pytest.fixture
def client(served: Running) -> Iterator[httpx.Client]:
    """Asks that server."""
    with served.client() as made:
        yield made


@pytest.fixture
def serve(tiny: Callable[[], Model]) -> Iterator[Serving]:
    """Start servers with options of their own."""
    with ExitStack() as stack:

        def start(open_model: Callable[[], Model] = tiny, **changes: object) -> Running:
            changes = {"grace": 0.0, **changes}
            options = replace(OPTIONS, **changes)  # type: ignore[arg-type]
            return stack.enter_context(serving(open_model, options))

        yield start
