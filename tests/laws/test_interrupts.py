"""An exception at any line of a step, an allocation or a read that fails: the next answer is right."""

from __future__ import annotations

import ast
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import outsize
from outsize.engine.model import Model
from outsize.errors import ReadError
from outsize.kv.kv import KV
from outsize.storage import file as medium
from outsize.storage.table import Table

SOURCE = Path(outsize.__file__).parent
EVERYTHING = (str(SOURCE),)
PROMPT, STEPS, QUICK = "one two one two one", 4, 25
WAYS = [("qwen3", "none"), ("qwen3", "ngram:k=3"), ("olmoe", "none"), ("olmoe", "ngram:k=3")]
WAYS += [("qwen3_5", "ngram:k=3")]
Place = tuple[str, int, int]  # file, line, how often it was reached before


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing by more, and wait for each other where cores are shared."""
    before, interval = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-4)
    yield
    torch.set_num_threads(before)
    sys.setswitchinterval(interval)


class Stop(KeyboardInterrupt):
    """As a signal would raise it."""


@cache
def locks(path: str) -> frozenset[int]:
    """Lines that take a lock: left normally, they are told of once more, where no signal can arrive (nor does
    one between such a line and a `try` as its first or last statement: have none there)."""
    nodes = ast.walk(ast.parse(Path(path).read_text()))
    return frozenset(
        node.lineno
        for node in nodes
        if isinstance(node, ast.With) and any("lock" in ast.unparse(item) for item in node.items)
    )


@contextmanager
def watched(
    told: Callable[[FrameType], None], within: tuple[str, ...] = EVERYTHING
) -> Iterator[None]:
    """`told` of every line of ours that this thread comes to."""

    def lines(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and frame.f_lineno not in locks(frame.f_code.co_filename):
            told(frame)
        return lines

    def calls(frame: FrameType, event: str, argument: Any) -> Any:
        return lines if frame.f_code.co_filename.startswith(within) else None

    sys.settrace(calls)
    try:
        yield
    finally:
        sys.settrace(None)


def places(model: Model) -> list[Place]:
    """Each line that an answer comes to, at one of the times."""
    seen: dict[tuple[str, int], int] = {}

    def count(frame: FrameType) -> None:
        at = frame.f_code.co_filename, frame.f_lineno
        seen[at] = seen.get(at, 0) + 1

    with watched(count):
        answer(model)
    chosen = random.Random(1)
    return [(path, line, chosen.randrange(times)) for (path, line), times in sorted(seen.items())]


def answer(model: Model) -> str:
    return model.generate(PROMPT, raw=True, max_tokens=STEPS)[0].text


def broken_off(model: Model, place: Place, ask: Callable[[Model], object] = answer) -> bool:
    """Was an answer interrupted there?"""
    path, number, left = place

    def stop(frame: FrameType) -> None:
        nonlocal left
        if (frame.f_lineno, frame.f_code.co_filename) == (number, path):
            left -= 1
            if left == -1:
                raise Stop

    try:
        with watched(stop, (path,)):
            ask(model)
    except Stop:
        return True
    return False


def sweep(model: Model, most: int | None) -> None:
    right, every = answer(model), places(model)
    assert answer(model) == right
    some = every if most is None else random.Random(2).sample(every, min(most, len(every)))
    stopped = 0
    for place in some:
        stopped += broken_off(model, place)
        assert answer(model) == right, f"after an interrupt at {place}"
    assert stopped > 0.7 * len(some)


@pytest.mark.parametrize(("family", "draft"), WAYS)
@pytest.mark.parametrize("native", [True, False])
def test_an_interrupt(
    open_paged: Callable[..., Model], family: str, draft: str, native: bool
) -> None:
    sweep(open_paged(family, draft, native), QUICK if native else QUICK // 3)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "draft"), WAYS)
@pytest.mark.parametrize("native", [True, False])
def test_an_interrupt_at_every_line(
    open_paged: Callable[..., Model], family: str, draft: str, native: bool
) -> None:
    sweep(open_paged(family, draft, native), None)


@pytest.mark.skipif(sys.platform == "win32", reason="has no interval timers")
@pytest.mark.parametrize("family", ["qwen3", "olmoe"])
def test_signals(open_paged: Callable[..., Model], family: str) -> None:
    """Real ones, whenever they come."""
    model = open_paged(family, "ngram:k=3")
    right, chance, stopped = answer(model), random.Random(4), 0

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stop

    started = time.perf_counter()
    answer(model)
    took, before = time.perf_counter() - started, signal.signal(signal.SIGALRM, stop)
    try:
        for _ in range(40):
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-4, took))
                answer(model)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Stop:
                stopped += 1
            assert answer(model) == right
    finally:
        signal.signal(signal.SIGALRM, before)
    assert stopped


@pytest.mark.parametrize("family", ["qwen3", "olmoe"])
def test_every_allocation_fails_once(
    open_paged: Callable[..., Model], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_paged(family)
    right, real = answer(model), torch.empty
    for number in range(0, 200, 7):
        left = number

        def failing(*shape: Any, **how: Any) -> torch.Tensor:
            nonlocal left
            left -= 1
            if left == -1:
                raise MemoryError
            return real(*shape, **how)

        monkeypatch.setattr(torch, "empty", failing)
        with suppress(MemoryError):
            answer(model)
        monkeypatch.setattr(torch, "empty", real)
        assert answer(model) == right, f"after allocation {number} failed"


@pytest.mark.parametrize("family", ["qwen3", "olmoe"])
def test_every_read_fails_once(
    open_paged: Callable[..., Model], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(medium.File, "handle", lambda self: None)  # read from Python
    model = open_paged(family)
    right, real = answer(model), Table.read_part
    failed = 0
    for number in range(0, 120, 7):
        left = number

        def failing(self: Table, index: int, out: memoryview, start: int) -> None:
            nonlocal left
            left -= 1
            if left == -1:
                raise ReadError(f"cannot read record {index}")
            real(self, index, out, start)

        monkeypatch.setattr(Table, "read_part", failing)
        try:
            answer(model)
        except ReadError:
            failed += 1
        monkeypatch.setattr(Table, "read_part", real)
        assert answer(model) == right, f"after read {number} failed"
    assert failed > 0


def test_a_conversation_goes_on_after_an_interrupt(open_paged: Callable[..., Model]) -> None:
    """Nothing half-computed passes for known, wherever the turn was broken off."""
    model = open_paged("qwen3", "none")
    every = places(model)
    for place in random.Random(3).sample(every, 12):
        talk = model.conversation(max_tokens=STEPS)
        "".join(talk.say(PROMPT))
        broken_off(model, place, lambda _, talk=talk: list(talk.say(PROMPT)))  # type: ignore[misc]
        messages = [*talk.messages, {"role": "user", "content": "and?"}]
        assert "".join(talk.say("and?")) == model.chat(messages, max_tokens=STEPS).text, place


def test_entries_that_were_not_filled_are_not_known(
    open_tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn broken off in its prompt, when the last layer's keys and values had room and no content."""
    model = open_tiny("llama", "fp32")
    last = model.pack.description.num_layers - 1
    real, talk = KV.append, model.conversation(max_tokens=STEPS)

    def torn(self: KV, layer: int, *rest: Any) -> torch.Tensor:
        if layer < last:
            return real(self, layer, *rest)
        self.reserve(layer, rest[-1])
        raise Stop

    monkeypatch.setattr(KV, "append", torn)
    with pytest.raises(Stop):
        list(talk.say(PROMPT))
    monkeypatch.setattr(KV, "append", real)
    messages = [*talk.messages, {"role": "user", "content": "and?"}]
    assert "".join(talk.say("and?")) == model.chat(messages, max_tokens=STEPS).text


def test_an_interrupt_of_a_draft_model(
    open_paged: Callable[..., Model], folder_of: Callable[[str], Path]
) -> None:
    """The smaller model's weights are put right, too."""
    model = open_paged("qwen3", f"model:{folder_of('qwen3')}:k=2")
    assert model.generate(PROMPT, raw=True, max_tokens=STEPS)[0].drafted
    sweep(model, QUICK)
