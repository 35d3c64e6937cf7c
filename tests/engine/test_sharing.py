"""One model, many callers: threads, suspended replies, forks, models opened again and again."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import outsize
from outsize.engine.model import Model
from outsize.errors import BusyError, ClosedError
from outsize.system import memory as budget
from outsize.text.channels import Piece
from outsize.text.tokens import Tokens
from tests import scripted
from tests.drafts import write_masks, write_peft

PROMPTS = [
    "one two three",
    "a b c a b c a",
    "x" * 40,
    "the sea",
    "zzz",
    "0 1 2 3 4",
    "Q",
    "hello, hello",
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Of torch's: tiny products gain nothing by more, and wait for each other where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def answer(model: Model, prompt: str) -> str:
    return model.generate(prompt, raw=True, max_tokens=6)[0].text


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("family", ["qwen3", "olmoe"])
def test_threads(open_paged: Callable[..., Model], family: str, count: int) -> None:
    model = open_paged(family, "ngram:k=3")
    alone = [answer(model, p) for p in PROMPTS]
    with ThreadPoolExecutor(count) as pool:
        together = list(pool.map(lambda p: answer(model, p), PROMPTS * 2))
        scores = list(pool.map(lambda p: model.score(p).logprobs, PROMPTS))
    assert together == alone * 2
    assert scores == [model.score(p).logprobs for p in PROMPTS]


def test_suspended_replies(open_paged: Callable[..., Model]) -> None:
    """Streams of one thread, in turns, with other calls between."""
    model = open_paged("qwen3")
    alone = [answer(model, p) for p in PROMPTS[:3]]
    streams = [model.stream(p, raw=True, max_tokens=6) for p in PROMPTS[:3]]
    parts = [iter(s) for s in streams]
    while sum(next(p, None) is not None for p in parts):
        assert answer(model, PROMPTS[3]) == answer(model, PROMPTS[3])
    assert [s.reply.text for s in streams] == alone


def test_adapters_hold_for_a_reply(open_tiny: Callable[..., Model], tmp_path: Path) -> None:
    model = open_tiny("llama", "fp32")
    for seed in (1, 2):
        model.load_adapter(f"a{seed}", write_peft(model, tmp_path / str(seed), seed))
    names = [None, "a1", "a2"] * 3

    def ask(name: str | None) -> str:
        return model.generate("hello", raw=True, max_tokens=8, adapter=name)[0].text

    alone = [ask(name) for name in names]
    assert len(set(alone)) == 3
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ask, names)) == alone


def test_a_model_closed_while_it_answers(open_paged: Callable[..., Model]) -> None:
    model, started, said = open_paged("qwen3"), threading.Event(), list[BaseException]()

    def go_on() -> None:
        try:
            for _ in range(1000):
                answer(model, PROMPTS[2])
                started.set()
        except BaseException as e:
            said.append(e)

    threads = [threading.Thread(target=go_on) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert started.wait(60)
    model.close()
    for thread in threads:
        thread.join(60)
    assert [type(e) for e in said] == [ClosedError] * 3
    with pytest.raises(ClosedError, match="load it again"):
        answer(model, "x")
    model.close()


def test_a_step_does_not_ask_its_own_model(folder_of: Callable[[str], Path]) -> None:
    def recorder(*_: object) -> None:
        answer(model, "x")

    with (
        outsize.load(folder_of("olmoe"), recorder=recorder, quiet=True) as model,
        pytest.raises(BusyError, match="in the middle of a step"),
    ):
        answer(model, "x")


def test_who_waits_gets_a_step(open_paged: Callable[..., Model]) -> None:
    """A long reply does not keep others out until its end."""
    model, ended = open_paged("qwen3"), list[str]()

    def ask(name: str, tokens: int) -> None:
        model.generate("abc", raw=True, max_tokens=tokens)
        ended.append(name)

    long = threading.Thread(target=ask, args=("long", 200))
    before = model.traffic.hits
    long.start()
    while model.traffic.hits == before:  # until its first step
        time.sleep(0.001)
    ask("short", 2)
    long.join(60)
    assert ended == ["short", "long"]


def test_a_turn_that_was_left_is_over_when_the_next_begins(open_tiny: Callable[..., Model]) -> None:
    model = open_tiny("llama", "fp32")
    talk = model.conversation(max_tokens=8)
    left = talk.say("one")
    first = next(left)
    second = "".join(talk.say("two"))
    assert list(left) == []
    messages = [
        {"role": "user", "content": "one"}, {"role": "assistant", "content": first},
        {"role": "user", "content": "two"},
    ]  # fmt: skip
    assert talk.messages[:3] == messages
    assert second == model.chat(messages, max_tokens=8).text


def test_a_conversation_is_of_one_caller(open_tiny: Callable[..., Model]) -> None:
    talk = open_tiny("llama", "fp32").conversation(max_tokens=8)
    parts = talk.parts("one")
    next(parts)

    def both() -> None:
        with pytest.raises(BusyError, match="still being answered"):
            next(talk.parts("two"))

    talk._open = within(both)
    next(talk._open)


def test_a_turn_cancelled_before_its_first_word_is_forgotten(
    open_tiny: Callable[..., Model],
) -> None:
    """An empty answer in the history teaches a model to answer nothing."""
    model = open_tiny("llama", "fp32")
    talk = model.conversation(max_tokens=8)
    "".join(talk.say("one"))
    before = list(talk.messages)
    parts = talk.parts("two")
    talk.cancel()
    assert "".join(piece for _, piece in parts) == ""
    assert talk.reply.finish == "cancelled"
    assert talk.messages == before
    third = "".join(talk.say("three"))
    assert third == model.chat([*before, {"role": "user", "content": "three"}], max_tokens=8).text


def within(call: Callable[[], None]) -> Generator[Piece, None, None]:
    """A generator that calls while it runs, as another thread would."""
    call()
    yield "text", ""


def test_tokenizers_are_shared(home: Path) -> None:
    """What one thread tells the tokenizer is not heard by others."""
    tokens = Tokens(scripted.byte_tokenizer(["<s>", "</s>"]), None, False)
    ways = [
        lambda: tokens.encode("ab<s>cd" * 200),
        lambda: tokens.encode("ab<s>cd" * 200, special=True),
        lambda: tokens.encode_marked(str(tokens.marks.mark("ab<s>cd" * 200)) + "<s>"),
    ]
    alone = [way() for way in ways]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(30):
            assert list(pool.map(lambda way: way(), ways * 4)) == alone * 4


def test_members_draw_with_seeds_of_their_own(open_tiny: Callable[..., Model]) -> None:
    model = open_tiny("llama", "fp32")
    how = {"temperature": 1.0, "max_tokens": 20, "raw": True, "top_k": 0, "min_p": 0.0}
    replies = model.generate(["abc"] * 6, **how)  # type: ignore[arg-type]
    assert len({r.text for r in replies}) == 6
    for reply in replies:
        again = model.generate("abc", seed=reply.options["seed"], **how)  # type: ignore[arg-type]
        assert again[0].text == reply.text
    same = model.generate(["abc"] * 3, seed=5, **how)  # type: ignore[arg-type]
    assert len({r.text for r in same}) == 1
    assert {r.options["seed"] for r in same} == {5}
    assert model.generate([], **how) == []  # type: ignore[arg-type]


FORK = """
    import os, sys, outsize
    from outsize.errors import OutsizeError
    model = outsize.load(sys.argv[1], quiet=True, native=sys.argv[2] == "native")
    model.generate("abc", raw=True, max_tokens=4)
    suspended = iter(model.stream("abc", raw=True, max_tokens=40))
    next(suspended)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        said = []
        for ask in (
            lambda: model.generate("abc", raw=True, max_tokens=4), lambda: next(suspended),
            lambda: model.score("abc"), lambda: model.chat([{"role": "user", "content": "x"}]),
            lambda: model.count("abc"), lambda: outsize.load(sys.argv[1], quiet=True),
        ):
            try:
                ask()
                said.append("answered")
            except OutsizeError as e:
                said.append(f"{type(e).__name__}: {e}")
        model.close()
        os.write(write, "\\n".join(said).encode())
        os._exit(0)
    os.waitpid(child, 0)
    print(os.read(read, 1 << 16).decode())
    print(model.generate("abc", raw=True, max_tokens=4)[0].finish)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no fork")
@pytest.mark.parametrize("reading", ["native", "plain"])
def test_a_fork_says_what_to_do(folder_of: Callable[[str], Path], reading: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORK), str(folder_of("llama")), reading],
        capture_output=True, text=True, timeout=120, env={**os.environ},
    )  # fmt: skip
    *said, last = done.stdout.splitlines()
    assert len(said) == 6, done.stdout + done.stderr
    for line in said:
        assert line.startswith("ForkError")
        assert "open models after the fork, or start processes by spawn" in line
    assert last == "length", "the parent goes on"


def test_a_closed_model_keeps_no_memory(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Whoever still has the model has neither weights nor a drafter's."""
    with outsize.load(folder_of("llama"), draft="none", quiet=True) as base:
        file = write_masks(base, tmp_path / "m.safetensors")
        adapter = write_peft(base, tmp_path / "a", 1)
    model = outsize.load(
        folder_of("llama"), draft=f"masks:{file}", adapters={"a": adapter}, quiet=True
    )
    answer(model, "abc")
    assert model.drafting.mtp is not None
    kept = [
        weakref.ref(thing) for thing in (model.transformer, model.drafting.mtp, model.adapters["a"])
    ]
    model.close()
    assert [there() for there in kept] == [None] * 3
    with pytest.raises(ClosedError):
        answer(model, "abc")


def test_memory_over_rounds(folder_of: Callable[[str], Path]) -> None:
    """Opened, asked, closed, again and again: the process does not grow."""
    sizes = []
    for _ in range(8):
        with outsize.load(folder_of("qwen3"), quiet=True) as model:
            answer(model, "abc")
        sizes.append(budget.resident())
    assert sizes[-1] - sizes[2] < 5 << 20
