"""The service: many asyncio tasks, one engine thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from outsize.engine import model as model_module
from outsize.engine.model import Model
from outsize.engine.scoring import Scored, scored
from outsize.engine.service import Answer, Limits, Service
from outsize.errors import ContextError, OptionError, QueueFullError, UnavailableError
from outsize.options import Options

LONG = Options(max_tokens=400, temperature=0.9, ignore_eos=True, logprobs=1)


@contextmanager
def serving(model: Model, limits: Limits | None = None) -> Iterator[Service]:
    service = Service(model, limits)
    try:
        yield service
    finally:
        service.close()


async def text_of(answer: Answer) -> str:
    return "".join([delta.text async for delta in answer])


def test_replies_in_company_are_those_of_the_model(open_tiny: Callable[..., Model]) -> None:
    model, prompts = open_tiny(), [f"prompt number {i}" for i in range(12)]
    options = [Options(max_tokens=20, temperature=0.7, seed=i, raw=True) for i in range(12)]
    wanted = [
        model.generate([p], max_tokens=20, temperature=0.7, seed=i, raw=True)[0].text
        for i, p in enumerate(prompts)
    ]

    async def main(service: Service) -> list[str]:
        async def one(prompt: str, own: Options) -> str:
            return await text_of(await service.ask(await service.encode(prompt, own), own))

        return await asyncio.gather(*map(one, prompts, options))

    with serving(model, Limits(streams=5)) as service:
        assert asyncio.run(main(service)) == wanted
        assert service.totals.requests == 12
        assert (service.load().running, service.load().waiting) == (0, 0)


def test_a_reply_that_is_left_stops_being_computed(open_tiny: Callable[..., Model]) -> None:
    async def main(service: Service) -> int:
        answer = await service.ask([5, 6, 7], LONG)
        count = 0
        async for _ in answer:
            count += 1
            if count == 3:
                break
        answer.cancel()
        while service.load().running or service.totals.requests == 0:
            await asyncio.sleep(0.001)
        return len(answer.request.seq.new_tokens)

    with serving(open_tiny()) as service:
        assert asyncio.run(main(service)) < 300
        assert service.totals.cancelled == 1


def test_more_than_may_wait_are_refused(open_tiny: Callable[..., Model]) -> None:
    async def main(service: Service) -> None:
        answers = [await service.ask([5, 6, 7], LONG) for _ in range(3)]
        with pytest.raises(QueueFullError, match="2 requests run and 1 wait") as caught:
            await service.ask([5, 6, 7], LONG)
        assert caught.value.retry_after_s >= 1
        for answer in answers:
            answer.cancel()
        await asyncio.gather(*map(text_of, answers))
        assert await text_of(await service.ask([5, 6], Options(max_tokens=3, ignore_eos=True)))

    with serving(open_tiny(), Limits(streams=2, max_queue=1)) as service:
        asyncio.run(main(service))


def test_what_can_never_run_is_refused_at_once(open_tiny: Callable[..., Model]) -> None:
    async def main(service: Service) -> None:
        with pytest.raises(ContextError, match="tokens"):
            await service.ask([5] * (service.model.context + 1), Options())
        with pytest.raises(OptionError, match="adapter"):
            await service.ask([5], Options(adapter="none"))
        answer = await service.ask([5], Options(logit_bias={1 << 20: 1.0}))
        with pytest.raises(OptionError, match="logit_bias"):
            await text_of(answer)

    with serving(open_tiny()) as service:
        asyncio.run(main(service))


def test_a_drain_lets_replies_end_and_takes_no_more(open_tiny: Callable[..., Model]) -> None:
    async def main(service: Service) -> None:
        answer = await service.ask([5, 6, 7], Options(max_tokens=30, ignore_eos=True))
        told = asyncio.create_task(text_of(answer))
        await service.drain(30.0)
        await told
        assert answer.reply.finish == "length"
        with pytest.raises(UnavailableError):
            await service.ask([5], Options())

    with serving(open_tiny()) as service:
        asyncio.run(main(service))


def test_a_drain_that_ran_out_fails_what_is_left(open_tiny: Callable[..., Model]) -> None:
    async def main(service: Service) -> None:
        answer = await service.ask([5, 6, 7], Options(max_tokens=10**6, ignore_eos=True))
        await service.drain(0.0)
        with pytest.raises(UnavailableError, match="ended before"):
            await text_of(answer)

    with serving(open_tiny()) as service:
        asyncio.run(main(service))


def test_logprobs_come_with_their_tokens_and_scores_agree(open_tiny: Callable[..., Model]) -> None:
    model = open_tiny()

    async def main(service: Service) -> None:
        options = Options(max_tokens=9, logprobs=3, ignore_eos=True)
        answer = await service.ask([5, 6, 7], options)
        tokens = [one async for delta in answer for one in delta.tokens]
        assert [one.token for one in tokens] == answer.request.seq.new_tokens
        assert tuple(tokens) == answer.reply.logprobs
        scored = await service.score([5, 6, 7, *answer.request.seq.new_tokens], 3)
        for mine, again in zip(tokens, scored[2:], strict=True):
            assert mine.token == again.token
            assert mine.logprob == pytest.approx(again.logprob, abs=0.05)

    with serving(model) as service:
        asyncio.run(main(service))


def test_a_prompt_far_too_long_is_refused_before_it_is_tokenized(
    open_tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sizes = open_tiny(), list[int]()
    encode = type(model.tokens).encode

    def counting(self: object, text: str, *rest: object, **more: object) -> list[int]:
        sizes.append(len(text))
        return encode(self, text, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(type(model.tokens), "encode", counting)
    for prompt in ("word " * 10**6, [{"role": "user", "content": "word " * 10**6}]):
        with pytest.raises(ContextError, match="5,000,000 characters"):
            model.stream(prompt, raw=isinstance(prompt, str))
    assert max(sizes) <= 16 * model.context


def test_requests_that_are_being_read_count_as_waiting(open_tiny: Callable[..., Model]) -> None:
    async def main(service: Service) -> None:
        options = Options(raw=True)
        first = [asyncio.create_task(service.encode("x" * 20_000, options)) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await service.encode("x", options)
        await asyncio.gather(*first, return_exceptions=True)
        assert await service.encode("x", options)

    with serving(open_tiny(), Limits(streams=2, max_queue=1)) as service:
        asyncio.run(main(service))


def test_a_score_that_is_left_is_computed_no_further(
    open_tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, may_go = list[int](), threading.Event()

    def counting(*given: object) -> Iterator[list[Scored]]:
        for part in scored(*given):  # type: ignore[arg-type]
            parts.append(len(part))
            may_go.wait(30)
            yield part

    async def main(service: Service) -> None:
        task = asyncio.create_task(service.score([5] * 200, 0))
        while not parts:
            await asyncio.sleep(0.001)
        assert service._batch.beside == 200
        task.cancel()
        may_go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert service._batch.beside == 0
        assert len(await service.score([5, 6, 7], 0)) == 2

    model = open_tiny()
    monkeypatch.setattr(model_module, "scored", counting)
    monkeypatch.setattr(model.transformer, "chunk", 32)
    with serving(model) as service:
        asyncio.run(main(service))
    assert parts == [32, 2]


def test_a_fault_in_telling_a_reply_ends_it_not_the_engine(
    open_tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: object) -> None:
        raise ValueError("no text")

    async def main(service: Service) -> None:
        with monkeypatch.context() as broken:
            broken.setattr("outsize.text.detokenize.Stream.push", wrong)
            with pytest.raises(ValueError, match="no text"):
                await text_of(await service.ask([5, 6, 7], LONG))
        assert await text_of(await service.ask([5, 6], Options(max_tokens=3, ignore_eos=True)))

    with serving(open_tiny()) as service:
        asyncio.run(main(service))
