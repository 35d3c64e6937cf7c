"""Law: a prompt whose beginning was computed before (in this process, or in another one that left it on disk)
is answered with the bits of one that was computed whole."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

import outsize
from outsize.engine.batch import Batch
from outsize.engine.model import Model
from outsize.engine.pace import Pace
from outsize.engine.prefixes import Prefixes, Ties
from outsize.engine.request import Request
from outsize.options import Options
from outsize.prefix.disk import DiskBlocks
from tests.drafts import write_peft

CHUNK, PAIRS = 32, 200
MIXTURES = ["qwen3_moe", "gpt_oss"]
FAMILIES = ["llama", "gemma3", *MIXTURES]


@contextmanager
def keeping(model: Model, make: Callable[[], Prefixes | None]) -> Iterator[Model]:
    """With a small chunk, and a prefix cache of its own."""
    scheduler, network = model.scheduler, model.transformer
    before, kept = network.chunk, scheduler.prefixes
    network.chunk, scheduler.prefixes = CHUNK, make()
    try:
        yield model
    finally:
        if scheduler.prefixes is not None:
            scheduler.prefixes.close()
        network.chunk, scheduler.prefixes = before, kept


def on_disk(folder: Path, most: int = 1 << 30) -> DiskBlocks:
    folder.mkdir(exist_ok=True)
    return DiskBlocks(folder, most, 1 << 40, True)


def little(folder: Path) -> Prefixes:
    """Two chunks in memory, the rest on disk."""
    return Prefixes(CHUNK, 2 * CHUNK, on_disk(folder))


def options(seed: int) -> Options:
    return Options(max_tokens=3, temperature=0.8, seed=seed, logprobs=2, ignore_eos=True)


def outcome(request: Request) -> tuple[object, ...]:
    return request.seq.new_tokens, request.logprobs, request.seq.finish


def answer(model: Model, prompts: Sequence[Sequence[int]], seed: int = 0) -> list[Request]:
    requests = [model.start(list(ids), options(seed + i)) for i, ids in enumerate(prompts)]
    batch = Batch(model.scheduler, pace=Pace(1.0))
    for request in requests:
        batch.add(request)
    while ran := batch.step():
        for request in ran:
            request.advance(0.0)
    batch.check()
    return requests


def cold(model: Model, prompts: Sequence[Sequence[int]], seed: int = 0) -> list[tuple[object, ...]]:
    with keeping(model, lambda: None):
        return [outcome(answer(model, [p], seed + i)[0]) for i, p in enumerate(prompts)]


def pairs(seed: int, count: int) -> Iterator[tuple[list[int], list[int]]]:
    """Two prompts with a beginning of any length in common."""
    draw = random.Random(seed)
    for _ in range(count):
        shared = draw.choices(range(5, 200), k=draw.randrange(0, 140))
        first, second = (draw.choices(range(5, 200), k=draw.randrange(1, 60)) for _ in range(2))
        yield shared + first, shared + second


@pytest.mark.parametrize(
    ("tier", "family"),
    [
        pytest.param(t, f, marks=pytest.mark.slow if t == "memory" and f in MIXTURES else ())
        for t in ("memory", "disk")
        for f in FAMILIES
    ],
)
def test_warm_is_cold(
    family: str, tier: str, open_tiny: Callable[..., Model], tmp_path: Path
) -> None:
    model, reused, read = open_tiny(family, "int8"), 0, 0
    for i, (first, second) in enumerate(pairs(FAMILIES.index(family), PAIRS // 8)):
        wanted = cold(model, [first, second], i)
        if tier == "memory":
            with keeping(model, lambda: Prefixes(CHUNK)):
                found = [answer(model, [p], i + n)[0] for n, p in enumerate((first, second))]
        else:  # what is in memory goes with the first
            with keeping(model, lambda: Prefixes(CHUNK, disk=on_disk(tmp_path))):
                found = answer(model, [first], i)
            with keeping(model, lambda: Prefixes(CHUNK, disk=on_disk(tmp_path))):
                found += answer(model, [second], i + 1)
        assert [outcome(r) for r in found] == wanted
        reused, read = reused + found[1].cached, read + found[1].traffic.read
    assert reused > 0
    assert (read > 0) == (tier == "disk")


def test_in_company_and_with_little_room(open_tiny: Callable[..., Model], tmp_path: Path) -> None:
    """Several at once, where blocks must be let go, and moved instead of copied."""
    model = open_tiny("llama", "int8")
    prompts = [p for pair in pairs(5, 8) for p in pair] + [p for pair in pairs(5, 8) for p in pair]
    wanted = cold(model, prompts)
    for most in (1 << 30, 2 * CHUNK, 0):
        with keeping(model, lambda most=most: Prefixes(CHUNK, most, on_disk(tmp_path / str(most)))):
            assert [outcome(r) for r in answer(model, prompts)] == wanted
            kept = model.scheduler.prefixes
            assert kept is not None
            assert kept.tokens <= most


def test_room_is_kept(open_tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that fits only without a second copy of its beginning takes the blocks; nothing is computed
    twice, and never is more stored than there is room for."""
    model = open_tiny("llama", "int8")
    ids = random.Random(1).choices(range(5, 200), k=150)
    (wanted,) = cold(model, [ids])
    monkeypatch.setattr(Batch, "room", 160)
    monkeypatch.setattr("outsize.engine.batch.GRAIN", 6)
    with keeping(model, lambda: Prefixes(CHUNK)):
        for i in range(3):
            (request,) = answer(model, [ids])
            assert outcome(request) == wanted
            assert request.cached == (128 if i else 0)
            assert model.scheduler.prefixes is not None
            assert model.scheduler.prefixes.tokens == 128


def test_a_conversation_keeps_only_what_was_computed_as_a_prompt(
    open_tiny: Callable[..., Model], tmp_path: Path
) -> None:
    """Its second turn begins with tokens that were decoded one by one: on disk there are none of them."""
    model = open_tiny("llama", "int8")
    with keeping(model, lambda: Prefixes(CHUNK, disk=on_disk(tmp_path))):
        chat = outsize.Conversation(model, Options(max_tokens=40, ignore_eos=True, raw=False))
        for text in ("x" * 70, "y" * 50):
            list(chat.say(text))
        said = model.encode([chat.messages], chat.options)[0]
    with keeping(model, lambda: Prefixes(CHUNK, disk=on_disk(tmp_path))):
        (request,) = answer(model, [said])
        assert 64 <= request.cached <= 96, "the first prompt's whole chunks"
        assert [outcome(request)] == cold(model, [said])


def test_of_other_adapters_and_threads_nothing_is_taken(open_tiny: Callable[..., Model]) -> None:
    model = open_tiny("llama", "int8")
    ids = random.Random(1).choices(range(5, 200), k=100)
    threads = [1]
    ties: Ties = lambda adapter: {"adapter": adapter, "threads": threads[0]}  # noqa: E731
    with keeping(model, lambda: Prefixes(CHUNK, ties=ties)):
        assert [answer(model, [ids])[0].cached for _ in range(2)] == [0, 96]
        threads[0] = 2
        assert answer(model, [ids])[0].cached == 0


def test_a_prompt_larger_than_the_cache(open_tiny: Callable[..., Model], tmp_path: Path) -> None:
    """Its first chunks are kept, and not put out by its last (as in antirez/ds4#157)."""
    model = open_tiny("llama", "int8")
    ids = random.Random(1).choices(range(5, 200), k=200)
    nbytes = model.transformer.new_kv().like.new_empty(0).element_size()
    d = model.pack.description
    file = 2 * d.num_layers * d.num_kv_heads * d.head_dim * CHUNK * nbytes + 4096
    written, cached = [], []
    for _ in range(3):
        with keeping(model, lambda: Prefixes(CHUNK, 0, on_disk(tmp_path, 3 * file))):
            (request,) = answer(model, [ids])
            assert model.scheduler.prefixes is not None
            model.scheduler.prefixes.flush()
            written.append(request.traffic.written)
            cached.append(request.cached)
    assert written == [3 * file, 0, 0]
    assert cached == [0, 96, 96]


def test_with_adapters(open_tiny: Callable[..., Model], tmp_path: Path) -> None:
    """Each adapter has its own beginnings; one under another name, or changed under its own, too."""
    model = open_tiny("llama", "int8")
    for seed in (1, 2):
        model.load_adapter(f"prefix-{seed}", write_peft(model, tmp_path / str(seed), seed))
    names = (None, "prefix-1", "prefix-2", "prefix-1")
    ids = random.Random(1).choices(range(5, 200), k=100)

    def ask(name: str | None) -> Request:
        request = model.start(list(ids), options(3).with_changes({"adapter": name}))
        batch = Batch(model.scheduler)
        batch.add(request)
        while batch.step():
            request.advance(0.0)
        return request

    with keeping(model, lambda: None):
        wanted = [outcome(ask(name)) for name in names]
    ties: Ties = lambda name: {"adapter": name and model.adapters[name].digest}  # noqa: E731
    with keeping(model, lambda: Prefixes(CHUNK, ties=ties)):
        found = [ask(name) for name in names]
        assert [outcome(r) for r in found] == wanted
        assert [r.cached for r in found] == [0, 0, 0, 96]
        model.load_adapter("prefix-1", tmp_path / "2")
        changed = ask("prefix-1")
    for seed in (1, 2):  # the model is shared with other tests
        del model.adapters[f"prefix-{seed}"]
    assert changed.cached == 96, "the same factors, computed under another name"
    assert outcome(changed) == wanted[2]


def test_where_weights_are_read_from_disk(open_paged: Callable[..., Model], tmp_path: Path) -> None:
    """In the least memory, with drafts; blocks come from disk, too."""
    prompts = [p for pair in pairs(9, 4) for p in pair]
    for family in ("llama", "qwen3_moe"):
        model = open_paged(family)
        wanted = cold(model, prompts)
        for _ in range(2):
            with keeping(model, partial(little, tmp_path / family)):
                requests = answer(model, prompts)
                assert [outcome(r) for r in requests] == wanted
        assert sum(r.traffic.read for r in requests) > 0


def test_other_processes_find_it(folder_of: Callable[[str], Path], own_home: Path) -> None:
    """Each computes the same bits, the second without the beginning."""
    text = "The same long beginning of a prompt, again and again. " * 7
    code = (
        "import outsize, sys\n"
        "with outsize.load(sys.argv[1], prefix_cache='disk', chunk=32, quiet=True) as m:\n"
        "    r = m.generate(sys.argv[2], max_tokens=4, raw=True, logprobs=2)[0]\n"
        "print(r.reused_tokens, r.reused_bytes_read > 0, [t.logprob for t in r.logprobs])"
    )
    folder = str(folder_of("llama"))
    run = [sys.executable, "-c", code, folder]
    found = [
        subprocess.run([*run, text + end], capture_output=True, text=True, check=True).stdout.split(
            " ", 2
        )
        for end in ("one", "two", "one")
    ]
    assert int(found[0][0]) == 0
    assert int(found[1][0]) >= 300
    assert found[2][1] == "True"
    assert found[0][2] == found[2][2]
