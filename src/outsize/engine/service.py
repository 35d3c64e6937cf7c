"""Answers requests of asyncio callers: one engine thread computes, any number of tasks wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from outsize.engine.model import Model
from outsize.engine.reply import Reply
from outsize.engine.stream import Streaming
from outsize.options import Options
from outsize.sampling.logprobs import TokenLogprob
from outsize.sampling.sample import seeded
from outsize.text.prompt import Prompt


@dataclass(frozen=True, slots=True)
class Limits:
    """What a service takes on."""

    max_queue: int = 64  # requests that wait; more are refused


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to a reply. `tokens` are there if the options ask for log-probabilities."""

    text: str = ""
    reasoning: str = ""
    tokens: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a service is."""

    running: int = 0
    waiting: int = 0
    kv_tokens: int = 0  # tokens whose keys and values are stored
    kv_room: int = 0  # and for how many there is room


class Answer:
    """A reply on its way: iterate over its deltas; `reply` is the account, complete after them."""

    def __init__(self, streaming: Streaming) -> None:
        self._streaming = streaming
        self._deltas: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue()

    @property
    def prompt_tokens(self) -> int:
        return self._streaming.request.seq.num_prompt

    @property
    def stop(self) -> str | None:
        """The stop string that ended the reply."""
        return None

    @property
    def reply(self) -> Reply:
        return self._streaming.reply

    def cancel(self) -> None:
        """Stop computing it, before the next step. Safe at any time, and more than once."""
        self._streaming.cancel()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while (delta := await self._deltas.get()) is not None:
            if isinstance(delta, BaseException):
                raise delta
            yield delta


class Service:
    """Runs the requests of many asyncio tasks on one model."""

    def __init__(self, model: Model, limits: Limits | None = None) -> None:
        self.model, self.limits = model, limits or Limits()
        self._engine = ThreadPoolExecutor(1, "engine")
        self._texts = ThreadPoolExecutor(2, "templates")

    async def encode(self, prompt: Prompt, options: Options) -> list[int]:
        """Token ids of a prompt, through the chat template where it is due. Raises OutsizeError."""
        loop = asyncio.get_running_loop()
        (ids,) = await loop.run_in_executor(self._texts, self.model.encode, [prompt], options)
        return ids

    async def ask(self, ids: Sequence[int], options: Options) -> Answer:
        """Put a request into the queue. Raises ContextError and OptionError for what can never run,
        QueueFullError, UnavailableError."""
        options, loop = seeded(options), asyncio.get_running_loop()
        request = self.model.start(list(ids), options)
        answer = Answer(Streaming(self.model.scheduler, request, options, time.perf_counter()))
        loop.run_in_executor(self._engine, self._run, answer, loop)
        return answer

    def _run(self, answer: Answer, loop: asyncio.AbstractEventLoop) -> None:
        def put(delta: Delta | BaseException | None) -> None:
            loop.call_soon_threadsafe(answer._deltas.put_nowait, delta)

        try:
            for kind, piece in answer._streaming.parts:
                put(Delta(text=piece) if kind == "text" else Delta(reasoning=piece))
            put(None)
        except BaseException as e:
            put(e)

    async def score(self, ids: Sequence[int], top: int) -> list[TokenLogprob]:
        """Of every token after the first: its log-probability, and those of the `top` likeliest."""
        raise NotImplementedError

    def load(self) -> Load:
        return Load()

    async def drain(self, grace_s: float) -> None:
        """Take no more requests, and let those that run end, or cancel them when the time is over."""

    def close(self) -> None:
        """End the engine thread. The model stays open."""
        self._engine.shutdown()
        self._texts.shutdown()
