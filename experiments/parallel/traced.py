"""Two ranks of the engine, each in a process pinned to a core of its own where there are two, over links that
are modelled (parallel/slow.py): what a token and a prompt take, and what each rank did between its messages.

`cases` opens one way after another in both processes. The follower runs the engine's own loop
(forward/lead.py), and tells afterwards when its messages began and ended; both clocks are the machine's.
experiments/parallel/machines.py plays the simulator's programs with what was measured.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain

import torch

from experiments.parallel.quiet import Quiet, usual
from outsize.bench.speed import TEXT
from outsize.engine import open_tokens
from outsize.engine.ranks.how import joined
from outsize.forward import chain_costs, words
from outsize.forward.full import full
from outsize.forward.lead import Lead, follow
from outsize.forward.span import Span
from outsize.home import home
from outsize.kernels.find import find
from outsize.model.transformer import Transformer
from outsize.model_config import Description
from outsize.pack import fetch
from outsize.parallel.meeting import Hello, Meeting, join
from outsize.parallel.programs import FRAME, Prompt
from outsize.parallel.rooms import as_bytes
from outsize.parallel.shard import cut
from outsize.parallel.slow import Slow, parse_link
from outsize.parallel.sockets import Sockets
from outsize.parallel.spec import parse_parallel
from outsize.parallel.split import Ranks, split
from outsize.parallel.transport import Buffer, Sending, Transport
from outsize.weights import load as weights

HERE, PINGS, TRIES = "127.0.0.1", 200, 13
Gaps = list[float]  # seconds of a rank's own before each of its messages, and after the last
Step = list[tuple[float, float]]  # when messages of a step began and ended


@dataclass(frozen=True)
class Case:
    """What both ranks know. `tokens`: decoded after the prompt; `size`: bytes of a message with which its
    software is measured."""

    model: str
    way: str
    link: str
    prompt: int
    tokens: int
    repeats: int
    chunk: int
    size: int

    @property
    def shape(self) -> tuple[str, object]:
        """Cases that are equal in it have the same shards."""
        return self.model, parse_parallel(self.way).way


class Traced:
    """A Transport that keeps when its messages began and ended, and whether a step begins with them."""

    def __init__(self, inner: Transport) -> None:
        self.rank, self.world, self.wire, self._inner = inner.rank, inner.world, inner.wire, inner
        self.times: list[tuple[float, float, float]] = []

    def exchange(self, out: Buffer, into: Mapping[int, Buffer]) -> None:
        self.scatter(dict.fromkeys(into, out), into)

    def scatter(self, out: Mapping[int, Buffer], into: Mapping[int, Buffer]) -> None:
        start = time.perf_counter()
        self._inner.scatter(out, into)
        self.times.append((start, time.perf_counter(), False))

    def send(self, to: int, out: Buffer) -> Sending:
        start = time.perf_counter()
        sending = self._inner.send(to, out)
        begins = self.rank == 0 and len(out) == FRAME
        self.times.append((start, time.perf_counter(), begins))
        return sending

    def receive(self, of: int, into: Buffer) -> None:
        start = time.perf_counter()
        self._inner.receive(of, into)
        self.times.append((start, time.perf_counter(), of == 0 and len(into) == FRAME))

    def close(self) -> None:
        self._inner.close()


def steps(times: Sequence[tuple[float, float, float]]) -> list[Step]:
    """Of each step, when its messages began and ended."""
    found = list[Step]()
    for start, end, begins in times:
        if begins:
            found.append([])
        if found:
            found[-1].append((start, end))
    return found


class Open:
    """One rank's part of a model, open."""

    def __init__(self, case: Case, rank: int) -> None:
        self.whole, self.backend = fetch.pack(case.model, quiet=True), find()
        d, tables = self.whole.description, self.whole.tables
        way = parse_parallel(case.way).way
        shards = split(self.whole.path.name, d, tables, Ranks((1.0, 1.0)), way)
        self.shard = cut(self.whole, shards[rank], home())
        self.loaded = weights.load(self.shard, self.backend)

    def joined(self, case: Case, raw: Transport) -> tuple[Slow, Traced, Transformer]:
        """Over a case's link."""
        slow = Slow(raw, parse_link(case.link))
        traced = Traced(slow)
        how = joined(parse_parallel(case.way), traced, self.backend)
        model = Transformer(self.shard.description, self.loaded, self.backend, ranks=how.ranks)
        model.relay, model.chunk = how.relay, case.chunk
        return slow, traced, model


@dataclass(frozen=True)
class Measured:
    """Of one case. `token_s`: of each repeat; `gaps`: of each repeat what each rank did before each of its
    messages and after the last; `prompts`: costs of each rank's own layers; `call_s`: half of what an
    exchange takes over what link and bytes do; `sent`: bytes of a repeat, by the leader and the other."""

    prompt_s: list[float]
    token_s: list[float]
    gaps: list[tuple[Gaps, Gaps]]
    prompts: tuple[Prompt, Prompt]
    call_s: float
    sent: tuple[int, int]
    d: Description


def software_s(transport: Transport, case: Case) -> float:
    """Of sending or receiving one message: both ranks exchange, and do nothing else."""
    link, out, into = parse_link(case.link), bytes(case.size), bytearray(case.size)
    took = []
    for _ in range(PINGS):
        start = time.perf_counter()
        transport.exchange(out, {1 - transport.rank: into})
        took.append(time.perf_counter() - start)
    wire_s = link.duration(case.size) + link.delay_s
    return max(0.0, statistics.median(took) - wire_s) / 2


def gaps(steps: Sequence[Step], start: float | None = None, end: float | None = None) -> Gaps:
    """Before each message of some steps in a row, and after the last. What was before the first, and after
    the last, is nothing where it is not told."""
    flat = [message for step in steps for message in step]
    ends = [flat[0][0] if start is None else start, *(m[1] for m in flat)]
    starts = [*(m[0] for m in flat), flat[-1][1] if end is None else end]
    return [b - a for a, b in zip(ends, starts, strict=True)]


def tell(transport: Transport, numbers: Sequence[float]) -> None:
    words.send(transport, [0], [len(numbers)])
    transport.send(0, as_bytes(torch.tensor(numbers, dtype=torch.float64, device="cpu"))).wait()


def hear(transport: Transport) -> list[float]:
    (size,) = words.receive(transport, 1)
    numbers = torch.empty(size, dtype=torch.float64, device="cpu")
    transport.receive(1, as_bytes(numbers))
    found: list[float] = numbers.tolist()
    return found


def followed(case: Case, opened: Open, raw: Transport) -> None:
    """What rank 1 does for a case, and its report."""
    slow, traced, model = opened.joined(case, raw)
    software_s(slow, case)
    own, sent = chain_costs.measured(model, TRIES, usual), slow.wire.sent
    follow(model, traced)
    tell(raw, [own.linear_s, own.pair_s, slow.wire.sent - sent, *chain.from_iterable(traced.times)])


def led(case: Case, opened: Open, raw: Transport) -> Measured:
    """What rank 0 does for a case: prompts, and tokens after them; the first repeat is not counted."""
    slow, traced, model = opened.joined(case, raw)
    call_s = software_s(slow, case)
    own = chain_costs.measured(model, TRIES, usual)  # while the other does the same
    lead = model.leader = Lead(traced)
    text = open_tokens.tokens(opened.whole).encode(TEXT, start=False)
    ids = [text[i % len(text)] for i in range(case.prompt)]
    clocks, sent, repeats = list[tuple[float, float, float]](), slow.wire.sent, 1 + case.repeats
    for _ in range(repeats):
        kv, start = model.new_kv(case.prompt + case.tokens), time.perf_counter()
        (out,) = full(model, [Span(0, ids)], [kv])
        begun = time.perf_counter()
        with model.threads.narrow(True):
            for at in range(case.prompt, case.prompt + case.tokens):
                (out,) = full(model, [Span(at, [int(out.logits_KV[-1].argmax())])], [kv])
        clocks.append((start, begun, time.perf_counter()))
    sent = slow.wire.sent - sent
    lead.end()
    linear_s, pair_s, came, *times = hear(raw)
    mine, theirs = steps(traced.times), steps([*zip(*[iter(times)] * 3, strict=True)])
    found = list[tuple[Gaps, Gaps]]()
    for repeat in range(1, repeats if case.tokens else 0):
        first = repeat * (1 + case.tokens) + 1
        part = slice(first, first + case.tokens)
        found.append((gaps(mine[part], *clocks[repeat][1:]), gaps(theirs[part])))
    return Measured(
        [b - a for a, b, _ in clocks[1:]], [(c - b) / max(1, case.tokens) for _, b, c in clocks[1:]],
        found, (own, replace(own, linear_s=linear_s, pair_s=pair_s)), call_s,
        (sent // repeats, round(came) // repeats), opened.whole.description,
    )  # fmt: skip


def cases(all_cases: Sequence[Case], keep: Callable[[Case, Measured, float], None]) -> None:
    """Run each; `keep` is told what was measured, and how many cores others had meanwhile. Cases in a row
    that have the same shards open them once."""
    torch.set_num_threads(1)
    meeting, hello = Meeting(HERE, 0), Hello(world=2)
    child = os.fork()
    pinned(0 if child else 1)
    if not child:
        meeting.close()
        try:
            mesh = join(HERE, meeting.port, replace(hello, rank=1), 60)
            _each(all_cases, Sockets(mesh), followed)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(0)
    mesh = meeting.gather(hello, 60)
    try:

        def one(case: Case, opened: Open, raw: Transport) -> None:
            quiet = Quiet()
            found = led(case, opened, raw)
            keep(case, found, quiet.others)

        _each(all_cases, Sockets(mesh), one)
    finally:
        mesh.close()
        with suppress(ProcessLookupError, ChildProcessError):
            os.waitpid(child, 0)


def _each(
    all_cases: Sequence[Case], raw: Transport, run: Callable[[Case, Open, Transport], None]
) -> None:
    opened, shape = None, None
    for case in all_cases:
        if opened is None or shape != case.shape:
            if opened is not None:
                opened.loaded.close()
            opened, shape = Open(case, raw.rank), case.shape
        run(case, opened, raw)


def pinned(core: int) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) > 1:
        os.sched_setaffinity(0, {allowed[core % len(allowed)]})
