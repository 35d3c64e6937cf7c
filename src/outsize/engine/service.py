"""Answers requests of asyncio callers: one engine thread computes, any number of tasks wait."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from outsize.engine.batch import Batch
from outsize.engine.load_report import Load, Totals, load_of
from outsize.engine.model import Model
from outsize.engine.pace import Pace
from outsize.engine.reply import Reply
from outsize.engine.request import Request
from outsize.errors import QueueFullError, UnavailableError
from outsize.options import Options
from outsize.plan.make import disk_rate
from outsize.plan.placement import BY_ROUTER, DISK, Placement
from outsize.sampling.logprobs import TokenLogprob
from outsize.text.prompt import Prompt

LONGEST_RETRY_S = 60.0
LEARN = 0.2
WATCH_S = 0.02  # between looks at what a drain waits for


@dataclass(frozen=True, slots=True)
class Limits:
    """What a service takes on."""

    streams: int | None = None  # replies that are computed at once; None: as many as were planned
    max_queue: int = 64  # requests that wait beside them; more are refused


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to a reply. `tokens` are there if the options ask for log-probabilities: those of
    the text, and the one that ended it."""

    text: str = ""
    reasoning: str = ""
    tokens: tuple[TokenLogprob, ...] = ()


class Answer:
    """A reply on its way: iterate over its deltas; `reply` is the account, complete after them. One that
    nobody iterates over any more is cancelled."""

    def __init__(self, service: Service, request: Request) -> None:
        self.request, self._service = request, service
        self._loop = asyncio.get_running_loop()
        self._deltas: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()
        self.started, self._before = time.perf_counter(), service.model.counts()
        self._told = 0  # log-probabilities that were handed out

    @property
    def prompt_tokens(self) -> int:
        return self.request.seq.num_prompt

    @property
    def stop(self) -> str | None:
        """The stop string that ended the reply."""
        return self.request.stream.stop

    @property
    def reply(self) -> Reply:
        return self._service.model.scheduler.reply(self.request, self.started, self._before)

    def cancel(self) -> None:
        """Stop computing it, before the next step. Safe at any time, and more than once."""
        self.request.seq.finish = self.request.seq.finish or "cancelled"
        self._service.wake()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        try:
            while (delta := await self._deltas.get()) is not None:
                if isinstance(delta, Exception):
                    raise delta
                yield delta
        finally:
            self.cancel()

    def advance(self, now: float, bytes_read: int) -> Delta | None:
        """What the last step added, on the engine's thread."""
        request, before = self.request, len(self.request.stream.reasoning)
        text = request.advance(now, bytes_read)
        tokens = tuple(request.logprobs_to_end[self._told :])
        self._told += len(tokens)
        delta = Delta(text, request.stream.reasoning[before:], tokens)
        return delta if text or delta.reasoning or tokens else None

    def put(self, items: Sequence[Delta | Exception | None]) -> None:
        """Hand over to the task that waits. From any thread."""
        try:
            self._loop.call_soon_threadsafe(self._take, items)
        except RuntimeError:  # its loop is closed: nobody waits
            self.cancel()

    def _take(self, items: Sequence[Delta | Exception | None]) -> None:
        for item in items:
            self._deltas.put_nowait(item)


class Service:
    """Runs the requests of many asyncio tasks on one model, with continuous batching."""

    def __init__(self, model: Model, limits: Limits | None = None) -> None:
        self.model, limits = model, limits or Limits()
        self.streams, self.max_queue = limits.streams or model.placement.streams, limits.max_queue
        pace = Pace(read_s=_slice_read_s(model.placement))
        self._batch = Batch(model.scheduler, self.streams, pace)
        self._changed = threading.Condition()
        self._arrived, self._answers = list[Answer](), dict[int, Answer]()
        self._is_ending = self._is_closed = False
        self._request_s = 0.0  # that a request takes
        self._encoding = 0  # requests whose prompts are being made tokens
        self.totals = Totals()
        self._load, self._scoring = Load(), asyncio.Lock()
        self._texts = ThreadPoolExecutor(2, "outsize-text")
        self._thread = threading.Thread(target=self._run, name="outsize-engine", daemon=True)
        self._thread.start()

    async def encode(self, prompt: Prompt, options: Options) -> list[int]:
        """Token ids of a prompt, through the chat template where it is due. It counts as a request that
        waits, so that under load it is refused before, not after this work. Raises OutsizeError."""
        run = asyncio.get_running_loop().run_in_executor
        self._check_room()
        self._encoding += 1
        try:
            (ids,) = await run(self._texts, self.model.encode_fitting, [prompt], options)
        finally:
            self._encoding -= 1
        return ids

    async def ask(self, ids: Sequence[int], options: Options) -> Answer:
        """Put a request into the queue. Raises ContextError and OptionError for what can never run,
        QueueFullError, UnavailableError."""
        run = asyncio.get_running_loop().run_in_executor  # a grammar takes a moment to compile
        request = await run(self._texts, self.model.start, list(ids), options)
        answer = Answer(self, request)
        with self._changed:
            self._check_room()
            self._answers[id(request)] = answer
            self._arrived.append(answer)
            self._changed.notify_all()
        return answer

    async def score(
        self, ids: Sequence[int], top: int, width: str | float | None = None
    ) -> list[TokenLogprob]:
        """Of every token after the first: its log-probability, and those of the `top` likeliest. One text
        after the other; one that nobody waits for any more is computed no further."""
        run, out = asyncio.get_running_loop().run_in_executor, list[TokenLogprob]()
        async with self._scoring:
            parts = self.model.logprobs_by_chunk(ids, top, width)
            self._batch.beside = len(ids)
            try:
                while (part := await run(self._texts, next, parts, None)) is not None:
                    out += [one.token for one in part]
            finally:
                self._batch.beside = 0
        return out

    async def check(self, ids: Sequence[int], options: Options) -> None:
        """Raise ContextError and OptionError for what can never run."""
        run = asyncio.get_running_loop().run_in_executor
        await run(self._texts, self.model.start, list(ids), options)

    def load(self) -> Load:
        """How busy it is, as of the last step."""
        return self._load

    async def drain(self, grace_s: float) -> None:
        """Take no more requests, and let those that run end, or fail them when the time is over."""
        self._is_ending = True
        end = time.monotonic() + grace_s
        while self._answers and time.monotonic() < end:
            await asyncio.sleep(WATCH_S)
        for answer in list(self._answers.values()):
            answer.put(
                [UnavailableError("the server ended before the reply was complete; ask again")]
            )
            answer.cancel()
        while self._answers:
            await asyncio.sleep(WATCH_S)

    def close(self) -> None:
        """End the engine thread, once the present step has ended. The model stays open."""
        with self._changed:
            self._is_closed = self._is_ending = True
            self._changed.notify_all()
        self._thread.join()
        self._texts.shutdown()

    def wake(self) -> None:
        """Look at cancelled requests, also where nothing is computed."""
        with self._changed:
            self._changed.notify_all()

    def _check_room(self) -> None:
        if self._is_ending:
            raise UnavailableError(
                "the server ends, and takes no more requests; ask again later", 5.0
            )
        live = sum(a.request.seq.finish is None for a in list(self._answers.values()))
        waiting = live + self._encoding - self.streams
        if waiting >= self.max_queue:
            after = self._request_s * (waiting + 1) / self.streams
            raise QueueFullError(
                f"the server is busy: {self.streams} requests run and {waiting} wait, and no more may "
                "(--max-queue); ask again later",
                min(LONGEST_RETRY_S, max(1.0, after)),
            )

    def _run(self) -> None:
        """The engine thread."""
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work)
                arrived, self._arrived = self._arrived, []
            for answer in arrived:
                self._batch.add(answer.request)
            if self._is_closed:
                self._fail(UnavailableError("the server ended before the reply was complete"))
                return
            self._step()

    def _has_work(self) -> bool:
        return self._is_closed or bool(self._arrived) or not self._batch.is_empty

    def _step(self) -> None:
        try:
            self._hand_out(self._batch.step())
        except Exception as e:  # of the step itself, as a failed read: of all that share it
            self._fail(e)

    def _hand_out(self, ran: Sequence[Request]) -> None:
        """What a step added to each of these replies."""
        now, read = time.perf_counter(), self.model.bytes_read
        for request in ran:
            answer = self._answers[id(request)]
            if request.seq.finish is None and (delta := answer.advance(now, read)) is not None:
                answer.put([delta])
        self._batch.drop_ended()
        self._load = load_of(self._batch, len(self._arrived))
        for answer in [a for a in self._answers.values() if a.request.seq.finish is not None]:
            self._end(answer, self._batch.failed.pop(id(answer.request), None))

    def _end(self, answer: Answer, error: Exception | None) -> None:
        """The last of a reply, its end; or what went wrong."""
        now = time.perf_counter()
        last = None if error is not None else answer.advance(now, self.model.bytes_read)
        self.totals.add(answer.request)
        took = now - answer.started
        self._request_s += LEARN * (took - self._request_s) if self._request_s else took
        del self._answers[id(answer.request)]
        answer.put([*([] if last is None else [last]), error])

    def _fail(self, error: Exception) -> None:
        """All that is under way ends with an error."""
        self._batch.close()
        self._load = load_of(self._batch, 0)
        for answer in list(self._answers.values()):
            answer.request.seq.finish = answer.request.seq.finish or "cancelled"
            self._end(answer, error)


def _slice_read_s(placement: Placement) -> float:
    """Seconds that reading for a slice of a prompt takes: nearly all experts are asked for."""
    rate = disk_rate()
    missing = sum(size for _, tier, size in placement.groups if tier in (DISK, BY_ROUTER))
    return missing / rate if rate else 0.0
