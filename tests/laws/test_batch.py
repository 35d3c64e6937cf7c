"""Law: what a request is answered, to the last bit of every log-probability, does not depend on who else is
computed, on how its prompt is sliced, on what was cached, or on whether it was put aside for a while."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outsize.engine.batch import Batch, Live
from outsize.engine.model import Model
from outsize.engine.pace import Pace
from outsize.engine.prefixes import Prefixes
from outsize.engine.request import Request
from outsize.errors import ReadError
from outsize.forward.chunked import split
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.kv.kv import KV
from outsize.options import Options

CHUNK = 32
ENCODING = "int8"  # floats' products of one row and of many differ
FAMILIES = ["llama", "gemma3", "qwen3_moe"]
MORE = [*FAMILIES, "qwen3_5", "gemma4"]  # with states of sequences, or entries of two sizes


@contextmanager
def chunked(model: Model) -> Iterator[Model]:
    """With a small chunk, as tiny prompts need to be cut at all, and without a prefix cache."""
    before, model.transformer.chunk = model.transformer.chunk, CHUNK
    kept, model.scheduler.prefixes = model.scheduler.prefixes, None
    try:
        yield model
    finally:
        model.transformer.chunk, model.scheduler.prefixes = before, kept


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(5, 200), k=length)


def options(seed: int) -> Options:
    return Options(max_tokens=12, temperature=0.8, seed=seed, logprobs=2, ignore_eos=True)


def outcome(request: Request) -> tuple[object, ...]:
    return request.seq.new_tokens, request.logprobs, request.seq.finish


def run(batch: Batch, arrivals: dict[int, list[Request]]) -> None:
    """Steps to the end; requests join before the step with their number."""
    number = 0
    while True:
        for request in arrivals.pop(number, []):
            batch.add(request)
        ran = batch.step()
        for request in ran:
            request.advance(0.0)
        batch.check()
        number += 1
        if not ran and not arrivals:
            return


def alone(model: Model, ids: Sequence[int], seed: int) -> tuple[object, ...]:
    request = model.start(list(ids), options(seed))
    run(Batch(model.scheduler), {0: [request]})
    return outcome(request)


@pytest.mark.parametrize("family", MORE)
def test_alone_in_company_sliced_and_late(family: str, open_tiny: Callable[..., Model]) -> None:
    with chunked(open_tiny(family, ENCODING)) as model:
        prompts = [prompt(i, n) for i, n in enumerate((3, 90, 40, 64, 65, 100, 17, 33))]
        wanted = [alone(model, ids, i) for i, ids in enumerate(prompts)]
        requests = [model.start(ids, options(i)) for i, ids in enumerate(prompts)]
        slow = Pace(token_s=1.0, step_s=0.0)  # a chunk a step
        arrivals = {0: requests[:2], 1: requests[2:3], 4: requests[3:6], 9: requests[6:]}
        run(Batch(model.scheduler, streams=5, pace=slow), arrivals)
        assert [outcome(r) for r in requests] == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cached_beginning_changes_no_bit(family: str, open_tiny: Callable[..., Model]) -> None:
    with chunked(open_tiny(family, ENCODING)) as model:
        common = prompt(1, 70)
        prompts = [common + prompt(i, n) for i, n in enumerate((3, 30, 1, 60))] + [common]
        wanted = [alone(model, ids, i) for i, ids in enumerate(prompts)]
        model.scheduler.prefixes = Prefixes(CHUNK)
        batch = Batch(model.scheduler, pace=Pace(1.0))
        later = [model.start(ids, options(i)) for i, ids in enumerate(prompts)]
        run(batch, {0: later[:1], 2: later[1:3], 30: later[3:]})
        assert [outcome(r) for r in later] == wanted
        assert [r.cached for r in later] == [0, 64, 64, 64, 64]


def test_replies_that_outgrow_the_room_are_put_aside(
    open_tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    with chunked(open_tiny("llama", ENCODING)) as model:
        prompts = [prompt(i, n) for i, n in enumerate((50, 40, 45))]
        wanted = [alone(model, ids, i) for i, ids in enumerate(prompts)]
        monkeypatch.setattr("outsize.engine.batch.GRAIN", 2)
        monkeypatch.setattr(Batch, "room", 112)
        requests = [model.start(ids, options(i)) for i, ids in enumerate(prompts)]
        batch, most, aside = Batch(model.scheduler), 0, 0
        for request in requests:
            batch.add(request)
        while ran := batch.step():
            most = max(most, batch.stored)
            aside += any(live.swapped is not None for live in batch.waiting)
            for request in ran:
                request.advance(0.0)
        assert [outcome(r) for r in requests] == wanted
        assert aside
        assert most <= 112


def test_what_others_hold_is_not_given_away(open_tiny: Callable[..., Model]) -> None:
    model = open_tiny("llama", ENCODING)
    batch = Batch(model.scheduler)
    batch.beside = batch.room
    for i in range(3):
        batch.add(model.start(prompt(i, 5), options(i)))
    batch.step()
    assert (len(batch.running), len(batch.waiting)) == (1, 2), "one that is alone always has room"
    batch.beside = 0
    batch.step()
    assert len(batch.running) == 3
    batch.close()


def test_what_ended_holds_no_keys_and_values(open_tiny: Callable[..., Model]) -> None:
    """Whoever still reads a reply would hold what others are given."""
    with chunked(open_tiny("llama", ENCODING)) as model:
        for prefixes in (None, Prefixes(CHUNK)):
            requests = [model.start(prompt(i, n), options(i)) for i, n in enumerate((50, 9, 70))]
            requests[1].seq.finish = "cancelled"
            model.scheduler.prefixes = prefixes
            batch = Batch(model.scheduler)
            run(batch, {0: requests})
            assert [request.kv.nbytes for request in requests] == [0, 0, 0]
            assert batch.stored == (0 if prefixes is None else 32 + 64)


@pytest.mark.parametrize("what", ["write", "read"])
def test_one_that_cannot_be_put_aside_fails_alone(
    what: str, open_tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise (
            OSError(28, "No space left on device")
            if what == "write"
            else ReadError("it is shorter")
        )

    with chunked(open_tiny("llama", ENCODING)) as model:
        wanted = alone(model, prompt(0, 50), 0)
        monkeypatch.setattr("outsize.engine.batch.GRAIN", 2)
        monkeypatch.setattr(Batch, "room", 112)
        monkeypatch.setattr(KV, what, fail)
        requests = [model.start(prompt(i, 50), options(i)) for i in range(2)]
        model.scheduler.prefixes = Prefixes(CHUNK)
        batch = Batch(model.scheduler)
        for request in requests:
            batch.add(request)
        while ran := batch.step():
            for request in ran:
                request.advance(0.0)
        assert outcome(requests[0]) == wanted
        told = str(batch.failed.pop(id(requests[1])))
        assert ("fewer --streams" if what == "write" else "shorter") in told
        assert batch.is_empty
        assert batch.stored == 32, "of what was lost, nothing is kept"


def test_one_that_waits_is_begun_in_order_and_dropped_when_cancelled(
    open_tiny: Callable[..., Model],
) -> None:
    model = open_tiny("llama", ENCODING)
    requests = [model.start(prompt(i, 5), options(i)) for i in range(3)]
    batch = Batch(model.scheduler, streams=1)
    for request in requests:
        batch.add(request)
    batch.step()
    requests[0].seq.finish = "cancelled"
    assert batch.step() == [requests[1]]
    requests[2].seq.finish = "cancelled"
    batch.step()
    assert batch.waiting == []
    batch.close()
    assert batch.is_empty


def test_what_fails_for_one_request_is_its_own(open_tiny: Callable[..., Model]) -> None:
    model = open_tiny("llama", ENCODING)
    good = model.start(prompt(1, 5), options(1))
    bad = model.start(prompt(2, 5), options(2).with_changes({"logit_bias": {1 << 20: 1.0}}))
    wanted = alone(model, prompt(1, 5), 1)
    batch = Batch(model.scheduler)
    batch.add(bad), batch.add(good)
    while ran := batch.step():
        for request in ran:
            request.advance(0.0)
    assert outcome(good) == wanted
    assert "logit_bias" in str(batch.failed[id(bad)])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 150), st.integers(0, 3), st.integers(1, 200))
def test_slices_cover_a_span_and_end_on_chunks(length: int, chunks: int, most: int) -> None:
    whole = Span(chunks * CHUNK, tuple(range(length)), 1)
    rest: Span | None = whole
    seen = list[int]()
    while rest is not None:
        part, rest = split(rest, most, CHUNK)
        assert part.start == whole.start + len(seen)
        seen += part.tokens
        assert part.want == (1 if rest is None else 0)
        assert rest is None or rest.start % CHUNK == 0
    assert tuple(seen) == whole.tokens


@pytest.mark.parametrize("family", MORE)
def test_slices_give_the_bits_of_the_whole(family: str, open_tiny: Callable[..., Model]) -> None:
    with chunked(open_tiny(family, ENCODING)) as model:
        t, ids = model.transformer, prompt(7, 110)
        (wanted,) = full(t, [Span(0, ids, 1)], [t.new_kv()])
        kv = t.new_kv()
        for start, end in ((0, 32), (32, 96), (96, 110)):
            (out,) = full(t, [Span(start, ids[start:end], int(end == 110))], [kv])
        assert torch.equal(out.logits_KV, wanted.logits_KV)


def filled(dtype: torch.dtype, length: int) -> KV:
    kv = KV(3, (2, 8), dtype, 40)
    for layer in range(3):
        k = torch.randn(length, 2, 8).to(dtype)
        kv.append(layer, k, k + 1, range(length))
    return kv


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_keys_and_values_come_back_as_they_were(dtype: torch.dtype) -> None:
    kv, file = filled(dtype, 11), io.BytesIO()
    before = [kv.view(layer).clone() for layer in range(3)]
    kv.write(file)
    assert kv.nbytes == 0
    file.seek(0)
    kv.read(file, 64)
    assert all(torch.equal(kv.view(i), old) for i, old in enumerate(before))
    other = KV(3, (2, 8), dtype)
    other.copy_from(kv, 7)
    assert other.length == 7
    assert all(torch.equal(other.view(i), old[:, :7]) for i, old in enumerate(before))
    kv.truncate(5)
    kv.fit()
    assert kv.nbytes == sum(old[:, :5].nbytes for old in before)


def test_prompts_grow_old_and_the_shortest_goes_first() -> None:
    """Of two prompts the shorter is run first, but the longer waits for no more than a few steps."""
    live = Live.__dataclass_fields__["passed"].default
    assert live == 0


def test_a_slice_is_as_long_as_replies_may_wait() -> None:
    pace = Pace(token_s=0.001, step_s=0.04)
    assert pace.room(1, 32) == 256, "its step is in the time that they may wait"
    assert pace.room(0, 32) == 992
    pace.saw(128, 1, 0.04 + 0.256)
    assert pace.room(1, 32) == 128, "tokens that take longer are believed at once"
    pace.saw(128, 1, 0.04 + 0.128)
    assert pace.token_s == pytest.approx(0.0017), "and quicker ones by and by"
    pace.saw(0, 3, 2.0)
    assert pace.room(1, 32) == 32, "a step that computes for long leaves no time"
    pace.saw(0, 3, 4.0, waited=3.5)
    assert pace.room(1, 32) > 256, "one that reads for long hides computing"
