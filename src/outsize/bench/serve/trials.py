"""Loads that a server must stand: abandoned requests, a long time, too many at once, malformed ones; and the
same bits whatever else it does. Each says whether it was `good`."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import islice
from typing import Any

from outsize.bench.serve import hostile as hostile_requests
from outsize.bench.serve.bench import Bench
from outsize.bench.serve.bodies import CHAT, COMPLETIONS, body_of
from outsize.bench.serve.client import LEFT, Exchange, send
from outsize.bench.serve.events import at
from outsize.bench.serve.hostile import Case
from outsize.bench.serve.summary import Row, percentiles, summed

MB = 1 << 20
STEADY = 5 * MB  # by which memory may differ before and after
ABANDONED, AT_ONCE = 1000, 16
SOAK_LONG = 64  # each so many requests of a soak, one has the longest prompt
MALFORMED, DAMAGED_SHARE = 10_000, 0.2
BUSY = (
    "running",
    "waiting",
    "requests_processing",
    "requests_deferred",
)  # gauges, ours and llama-server's
REFUSED_S, ANSWERED_S = (
    0.05,
    1.0,
)  # bars: until a full queue says so, and until anything malformed is refused
Job = Callable[[], Awaitable[Exchange]]


async def disconnects(bench: Bench, _: int) -> Row:
    """Requests to all endpoints that are left at random moments: in the queue, the prompt or the reply, with
    a stream and without. Memory stays, and the next answer is the same."""
    o, count = bench.options, bench.options.requests or ABANDONED
    question = bench.prompt(o.prompt_tokens)
    before = await bench.ask(question, o.new_tokens)
    await _abandon(
        bench, min(count, 64), before.seconds
    )  # until memory is taken that is taken once
    size = await bench.memory.settled()
    left = await _abandon(bench, count, before.seconds)
    idle_s = await _until_idle(bench)
    after = await bench.ask(question, o.new_tokens)
    grown = await _grown(bench, size)
    others = Counter(e.error for e in left if e.error and e.error != LEFT and e.status != 429)
    return summed([before, after]) | {
        "requests": count, "left": sum(e.error == LEFT for e in left),
        "refused": sum(e.status == 429 for e in left), "errors": dict(others),
        "idle_s": idle_s, "next_s": round(after.seconds, 5), "alone_s": round(before.seconds, 5),
        "grown_bytes": grown, "same_text": after.text == before.text,
        "good": not others and after.text == before.text and (grown or 0) <= STEADY,
    }  # fmt: skip


async def _until_idle(bench: Bench) -> float | None:
    """Seconds until nothing runs or waits any more; None: the server does not say."""
    started = time.perf_counter()
    while gauges := await bench.gauges():
        busy = [value for name, value in gauges.items() if name.endswith(BUSY)]
        if not busy:
            return None
        if not any(busy):
            return round(time.perf_counter() - started, 5)
        await asyncio.sleep(0.01)
    return None


async def _abandon(bench: Bench, count: int, reply_s: float) -> list[Exchange]:
    """Leaves each at some moment of the time that a reply takes beside others."""

    async def job(path: str, stream: bool, leave_s: float) -> Exchange:
        common = {"model": bench.name, "max_tokens": bench.options.new_tokens, "temperature": 0.0}
        body = body_of(path, bench.prompt(bench.options.prompt_tokens), common | {"stream": stream})
        return await send(
            bench.address, bench.address.request(path, body), bench.options.limit, leave_s
        )

    draw, paths = bench.random, await bench.endpoints()
    jobs: list[Job] = [
        partial(job, draw.choice(paths), draw.random() < 0.7, draw.random() ** 2 * reply_s * 4)
        for _ in range(count)
    ]
    return await bench.crew(jobs, AT_ONCE, "abandoned")


async def _grown(bench: Bench, before: int | None) -> int | None:
    after = await bench.memory.settled()
    return None if before is None or after is None else after - before


async def soak(bench: Bench, streams: int) -> Row:
    """So many clients for `seconds`, with prompts of all lengths: no error, and memory that does not grow."""
    o, out = bench.options, list[Exchange]()
    alone = await bench.ask(bench.prompt(o.prompt_tokens), o.new_tokens)
    start, draw = time.monotonic(), bench.random

    async def client() -> None:
        while time.monotonic() - start < o.seconds:
            is_long = draw.randrange(SOAK_LONG) == 0
            tokens = o.long_tokens if is_long else draw.randint(8, 4 * o.prompt_tokens)
            how = {"temperature": draw.choice((0.0, 0.8)), "seed": draw.randrange(1 << 31)}
            out.append(await bench.ask(bench.prompt(tokens), draw.randint(2, o.new_tokens), how))

    async with asyncio.TaskGroup() as group:
        watch = group.create_task(_watch(bench, start))
        clients = [group.create_task(client()) for _ in range(streams)]
        await asyncio.wait(clients)
        watch.cancel()
    row, slope = summed(out), bench.memory.slope()
    a_request = slope * o.seconds / max(1, len(out))
    return row | {
        "alone_tokens_per_s": round(alone.new_tokens / alone.seconds, 3), "bytes_per_s": _number(slope),
        "bytes_per_request": _number(a_request),
        "samples": [size for _, size in bench.memory.samples], "good": not row["errors"],
    }  # fmt: skip


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 1)


async def _watch(bench: Bench, start: float) -> None:
    """Look at memory once a second."""
    bench.memory.samples.clear()
    while True:
        bench.memory.sample()
        bench.draw("soak", int(time.monotonic() - start), int(bench.options.seconds))
        await asyncio.sleep(1)


async def overload(bench: Bench, _: int) -> Row:
    """Many more requests at once than may wait: those refused are told so at once, all others answered."""
    o, count = bench.options, bench.options.requests or 200
    jobs: list[Job] = [
        partial(bench.ask, bench.prompt(o.prompt_tokens), o.new_tokens) for _ in range(count)
    ]
    out = await bench.crew(jobs, count, "overload")
    refused = [e for e in out if e.status == 429]
    told = [e for e in refused if e.headers.get("retry-after")]
    others = Counter(e.error for e in out if e.error and e.status != 429)
    good = not others and len(told) == len(refused) and len(refused) < count
    return summed([e for e in out if e.status != 429]) | {
        "requests": count, "refused": len(refused), "with_retry_after": len(told), "errors": dict(others),
        "refused_s": percentiles(e.seconds for e in refused),
        "late": sum(e.seconds > REFUSED_S for e in refused), "good": good,
    }  # fmt: skip


async def hostile(bench: Bench, _: int) -> Row:
    """Malformed requests: only statuses of 4xx, at once; memory stays, and the next answer is the same."""
    count, question = bench.options.requests or MALFORMED, bench.prompt(20)
    before = await bench.ask(question, 8)
    a, name, draw = bench.address, bench.name, bench.random
    listed = list(hostile_requests.cases(a, name))
    found = await _refused(bench, listed, 1)  # also until memory is taken that is taken once
    size = await bench.memory.settled()
    rest = max(0, count - len(listed))
    some = int(rest * DAMAGED_SHARE)
    noise = islice(hostile_requests.damaged(a, name, draw), some)
    wrong = islice(hostile_requests.mutants(a, name, draw), rest - some)
    found += await _refused(bench, list(wrong), AT_ONCE)
    broken = await _refused(bench, list(noise), AT_ONCE)
    after, grown = await bench.ask(question, 8), await _grown(bench, size)
    bad = [(c.name, e.error or str(e.status)) for c, e in found if not is_refusal(c, e)]
    bad += [(c.name, e.error) for c, e in broken if e.status >= 500 or not e.status]
    slow = [c.name for c, e in found if e.seconds > ANSWERED_S]
    statuses = Counter(str(e.status or e.error) for _, e in [*found, *broken])
    return summed([before, after]) | {
        "requests": len(found) + len(broken), "statuses": dict(statuses), "bad": bad[:50],
        "bad_count": len(bad), "answer_s": percentiles(e.seconds for _, e in found), "slow": slow[:50],
        "grown_bytes": grown, "same_text": after.text == before.text,
        "good": not bad and not slow and after.text == before.text and (grown or 0) <= STEADY,
    }  # fmt: skip


def is_refusal(case: Case, found: Exchange) -> bool:
    if not found.status:
        return case.may_close
    return 400 <= found.status < 500 or (case.is_sound and found.status == 200)


async def _refused(bench: Bench, asked: list[Case], at_once: int) -> list[tuple[Case, Exchange]]:
    jobs: list[Job] = [partial(send, bench.address, c.data, 30.0) for c in asked]
    return list(zip(asked, await bench.crew(jobs, at_once, "malformed"), strict=True))


async def bits(bench: Bench, streams: int) -> Row:
    """The same requests alone, in company, after other traffic, and without drafts: the same texts and
    log-probabilities, byte for byte."""
    o, count = bench.options, bench.options.requests or 200
    asked = [bench.prompt(bench.random.randint(2, 3 * o.prompt_tokens)) for _ in range(count)]
    jobs: list[Job] = [partial(_told, bench, text, number) for number, text in enumerate(asked)]
    alone = await bench.crew(jobs, 1, "alone")
    row = {"streams": streams} | _differing(
        alone, "company", await bench.crew(jobs, streams, "in company")
    )
    await _abandon(bench, min(count, 64), alone[0].seconds)
    row |= _differing(alone, "later", await bench.crew(jobs, streams, "after other traffic"))
    if await bench.restart("--draft=none"):
        row |= _differing(alone, "no_drafts", await bench.crew(jobs, streams, "without drafts"))
        await bench.restart()
    differing = sum(of for key, of in row.items() if key.startswith("differ"))
    return summed(alone) | row | {"good": differing == 0 and not any(e.error for e in alone)}


async def _told(bench: Bench, prompt: str, number: int) -> Exchange:
    """A reply with log-probabilities, drawn for every other one."""
    drawn = {"temperature": 0.8, "seed": number} if number % 2 else {"temperature": 0.0}
    path, ask = (
        (CHAT, {"logprobs": True, "top_logprobs": 3})
        if bench.options.chat
        else (COMPLETIONS, {"logprobs": 3})
    )
    more = {"stream": False, **drawn, **ask}
    data = bench.request(path, prompt, bench.changes(min(24, bench.options.new_tokens), more))
    return await send(bench.address, data, bench.options.limit)


def _differing(alone: list[Exchange], what: str, others: list[Exchange]) -> Row:
    """How many answers are not the same."""
    pairs = zip(alone, others, strict=True)
    return {f"differ_{what}": sum(_answer(a) != _answer(b) for a, b in pairs)}


def _answer(found: Exchange) -> str:
    choice: Any = at(found.payload, "choices", 0)
    return json.dumps([found.error, choice], sort_keys=True)
