"""The same model without a server, in a process of its own: what serving is measured against."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from outsize.engine import load as loading
from outsize.errors import UnavailableError
from outsize.options import LoadChanges
from outsize.plan import probe

OPEN_S = 600.0  # seconds to open a model, at most


class Timed(NamedTuple):
    """Replies that were computed in process."""

    texts: list[str]
    new_tokens: int  # of all
    first_s: float  # until the first text
    seconds: float  # until the end


class InProcess:
    """Close it, or use it in a `with`."""

    def __init__(self, model: str, how: LoadChanges, limit_s: float = OPEN_S) -> None:
        context = multiprocessing.get_context("spawn")
        self._limit_s = limit_s
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(theirs, model, how), daemon=True)
        self._process.start()
        theirs.close()
        self.about: dict[str, Any] = self._receive()

    def stream(self, prompt: object, changes: Mapping[str, object]) -> Timed:
        """One reply, by `Model.stream`."""
        return self._ask(True, prompt, changes)

    def together(self, prompts: list[object], changes: Mapping[str, object]) -> Timed:
        """Several, by one call of `Model.generate`; the first text is not noted."""
        return self._ask(False, prompts, changes)

    def _ask(self, *what: object) -> Timed:
        self._pipe.send(what)
        return Timed(*self._receive())

    def _receive(self) -> Any:
        """Raises UnavailableError."""
        try:
            if self._pipe.poll(self._limit_s):
                return self._pipe.recv()
        except EOFError:
            pass
        self._process.kill()
        raise UnavailableError(
            f"the model in process gave no answer within {self._limit_s:g} s, or its process ended; "
            "leave out --in-process, or give it more memory"
        )

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._pipe.close()  # which the other takes as the end
        self._process.join(10)
        self._process.kill()
        self._process.join()


def _run(pipe: Connection, model: str, how: LoadChanges) -> None:
    """The other process: answers until the pipe is closed."""
    probe.set_threads(how.get("threads"))
    once: LoadChanges = {**how, "prefix_cache": "off"}
    with loading.load(model, **once) as m:
        held = round(1 - m.placement.streamed / max(1, m.pack.size), 4)
        pipe.send({"held_share": held, "context": m.context})
        while True:
            try:
                is_one, what, changes = pipe.recv()
            except EOFError:
                return
            pipe.send(_timed(m, what, changes) if is_one else _timed_together(m, what, changes))


def _timed(m: Any, prompt: Any, changes: Any) -> Timed:
    started = time.perf_counter()
    streaming, times, pieces = m.stream(prompt, **changes), list[float](), list[str]()
    for piece in streaming:
        times.append(time.perf_counter() - started)
        pieces.append(piece)
    seconds = time.perf_counter() - started
    return Timed(
        ["".join(pieces)], streaming.reply.new_tokens, min(times, default=seconds), seconds
    )


def _timed_together(m: Any, prompts: Any, changes: Any) -> Timed:
    started = time.perf_counter()
    replies = m.generate(prompts, **changes)
    seconds = time.perf_counter() - started
    return Timed([r.text for r in replies], sum(r.new_tokens for r in replies), seconds, seconds)
