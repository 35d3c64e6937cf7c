"""Loads whose times count: one stream, many, a long prompt that joins, an idle server, conversations in turn.

Each is a coroutine from (bench, clients at once) to what was found, as JSON has it.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from typing import Any

from outsize.bench.serve.bench import Bench
from outsize.bench.serve.bodies import Body
from outsize.bench.serve.client import Exchange
from outsize.bench.serve.in_process import Timed
from outsize.bench.serve.summary import Row, percentiles, summed, together, within

COLD = 0.05  # of a prompt may be cached, as the start that all have in common
FLOOD = 24  # long prompts that should drive everything else out of a server's cache
TURNS, HISTORY = 4, 2000  # of a conversation; tokens of its first turn
SPREAD = 0.7  # of a reply's time, over which clients arrive
JOINED = 4  # streams that a long prompt joins
BASE = "The history of the sea is long and full of people who left home to find new land. "


async def one(bench: Bench, _: int) -> Row:
    """One stream, in turn with `Model.stream` where that is asked for; the texts must be the same."""
    o = bench.options
    exchanges, pairs = await _in_turn(bench, o.requests or 5, (o.prompt_tokens, o.new_tokens))
    rate = _median(e.new_tokens / e.seconds for e in exchanges if not e.error)
    return summed(exchanges) | {"tokens_per_s": rate} | _beside(pairs)


async def idle(bench: Bench, _: int) -> Row:
    """The first token of an idle server, for a prompt of 20 tokens, in turn with the model in process."""
    exchanges, pairs = await _in_turn(bench, bench.options.requests or 100, (20, 2))
    return summed(exchanges) | _beside(pairs)


async def _in_turn(
    bench: Bench, count: int, tokens: tuple[int, int]
) -> tuple[list[Exchange], list[Row]]:
    """Requests one after another, each paired with the same in process, the order changing. The first of each
    warms up, and is left out. `tokens`: of a prompt, of its reply."""
    exchanges, pairs = list[Exchange](), list[Row]()
    for number in range(count + 1):
        prompt = bench.prompt(tokens[0])
        inside = await _inside(bench, prompt, tokens[1]) if number % 2 else None
        exchange = await bench.ask(prompt, tokens[1])
        inside = inside or await _inside(bench, prompt, tokens[1])
        bench.draw("one stream", number, count)
        if number:
            exchanges.append(exchange)
            pairs += [] if inside is None or exchange.error else [_pair(exchange, inside)]
    return exchanges, pairs


async def _inside(bench: Bench, prompt: str, new_tokens: int) -> Timed | None:
    """The same in process; None: that is not asked for."""
    if bench.in_process is None:
        return None
    asked, changes = _asked(bench, prompt), _changes(bench, new_tokens)
    return await asyncio.to_thread(bench.in_process.stream, asked, changes)


def _asked(bench: Bench, prompt: str) -> Any:
    return [{"role": "user", "content": prompt}] if bench.options.chat else prompt


def _changes(bench: Bench, new_tokens: int) -> Body:
    return bench.changes(new_tokens, {"raw": not bench.options.chat})


def _pair(exchange: Exchange, inside: Timed) -> Row:
    return {
        "tokens_per_s": inside.new_tokens / inside.seconds, "first_token_s": inside.first_s,
        "ratio": inside.seconds / exchange.seconds, "later_s": exchange.first_s - inside.first_s,
        "same": inside.texts == [exchange.text],
    }  # fmt: skip


def _beside(pairs: list[Row]) -> Row:
    """Medians and all of what was done in turn; nothing without pairs."""
    if not pairs:
        return {}
    keys = {key: [round(pair[key], 5) for pair in pairs] for key in pairs[0] if key != "same"}
    same = all(pair["same"] for pair in pairs)
    return {f"in_process_{key}": _median(keys[key]) for key in ("tokens_per_s", "first_token_s")} | {
        "ratios": keys["ratio"], "ratio": _median(keys["ratio"]), "later_s": percentiles(keys["later_s"]),
        "same_texts": same, "good": same,
    }  # fmt: skip


def _median(values: Any) -> float:
    kept = [v for v in values if not math.isnan(v)]
    return round(statistics.median(kept), 5) if kept else 0.0


async def many(bench: Bench, streams: int) -> Row:
    """So many clients, short prompts, arrivals spread; each sends its requests one after another."""
    o, rounds = bench.options, max(1, bench.options.requests // streams)
    reply_s = (await bench.ask(bench.prompt(o.prompt_tokens), o.new_tokens)).seconds
    delays = [bench.random.random() * SPREAD * reply_s for _ in range(streams)]
    out = list[Exchange]()

    async def client(delay: float) -> None:
        await asyncio.sleep(delay if streams > 1 else 0)
        for _ in range(rounds):
            out.append(await bench.ask(bench.prompt(o.prompt_tokens), o.new_tokens))
            bench.draw(f"{streams} streams", len(out), streams * rounds)

    async with asyncio.TaskGroup() as group:
        for delay in delays:
            group.create_task(client(delay))
    gaps = percentiles(gap for e in out for gap in e.gaps) or {}
    steady = together(out) if rounds == 1 else _middle(out)
    ratios = {
        f"{p}_to_p50": round(gaps[p] / max(gaps["p50"], 1e-9), 3) for p in ("p95", "p99") if gaps
    }
    return summed(out) | {"steady": steady, **ratios}


def _middle(out: list[Exchange]) -> Row:
    """Between the first quarter and the last of a load that goes on."""
    began = min(e.began for e in out)
    whole = max(e.began + e.seconds for e in out) - began
    return within(out, began + whole / 4, began + whole * 3 / 4)


async def batch(bench: Bench, streams: int) -> Row:
    """Prompts of 60 to 550 characters at once, in turn with one call of `Model.generate` on all of them."""
    o, prompts = bench.options, [(BASE * 9)[: 60 + 70 * (i % 8)] + str(i) for i in range(streams)]
    ratios, rates, same, row = list[float](), list[float](), True, Row()
    for number in range((o.requests or 5) + 1):
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(bench.ask(p, o.new_tokens)) for p in prompts]
        row = summed([task.result() for task in tasks])
        bench.draw("together", number, o.requests or 5)
        if bench.in_process and number:
            asked, changes = [_asked(bench, p) for p in prompts], _changes(bench, o.new_tokens)
            inside = await asyncio.to_thread(bench.in_process.together, asked, changes)
            same = same and inside.texts == [task.result().text for task in tasks]
            rates.append(round(inside.new_tokens / inside.seconds, 3))
            ratios.append(round(row["tokens_per_s"] / rates[-1], 4))
    told = {"same_texts": same, "good": same, "in_process_tokens_per_s": _median(rates)}
    return row | ({"ratio": _median(ratios), "ratios": ratios} | told if ratios else {})


async def long(bench: Bench, _: int) -> Row:
    """A long prompt joins four streams: the largest gap of theirs, the rate that they keep, and how long the
    newcomer waits, against alone."""
    o = bench.options
    alone = await bench.ask(bench.prompt(o.long_tokens), 8)
    quick = await bench.ask(bench.prompt(o.prompt_tokens), o.new_tokens)
    # They answer for longer than the newcomer takes: four together, at a part of the rate of one.
    tokens = max(
        o.new_tokens, int(2 * alone.first_s / max(quick.seconds, 1e-9) * o.new_tokens) + 64
    )
    tasks = [
        asyncio.create_task(bench.ask(bench.prompt(o.prompt_tokens), tokens)) for _ in range(JOINED)
    ]
    await asyncio.sleep(quick.seconds)
    joined = await bench.ask(bench.prompt(o.long_tokens), 8)
    others = list(await asyncio.gather(*tasks))
    started = max((e.began + e.first_s for e in others if not math.isnan(e.first_s)), default=0.0)
    before = within(others, started, joined.began)
    during = within(others, joined.began, joined.began + joined.first_s)
    kept = (during["tokens_per_s"] or 0) / (before["tokens_per_s"] or math.inf)
    return summed([*others, joined]) | {
        "long_tokens": joined.prompt_tokens, "before": before, "during": during, "kept": round(kept, 4),
        "largest_gap_s": (during["gap_s"] or {}).get("most"), "alone_first_s": round(alone.first_s, 5),
        "joined_first_s": round(joined.first_s, 5),
        "first_ratio": round(joined.first_s / alone.first_s, 4),
    }  # fmt: skip


async def prefix(bench: Bench, _: int) -> Row:
    """Two conversations in turn: the first token of a later turn against that of the first, which is cold;
    then the last turn once more, when other prompts have driven it out of the cache: the same text."""
    talks: list[list[dict[str, str]]] = [[], []]
    cold, later, last = list[Exchange](), list[Exchange](), Exchange()
    history = min(HISTORY, bench.options.long_tokens)
    for turn in range(TURNS):
        for talk in talks:
            talk.append({"role": "user", "content": bench.prompt(20 if turn else history)})
            last = await bench.ask(talk, 16)
            (later if turn else cold).append(last)
            asked = list(talk)
            talk.append({"role": "assistant", "content": last.text})
        bench.draw("conversations", turn + 1, TURNS)
    again = await _without_cache(bench, asked)
    shares = [e.cached_tokens / max(1, e.prompt_tokens) for e in later]
    ratio = _median(e.first_s for e in later) / max(1e-9, _median(e.first_s for e in cold))
    return summed([*cold, *later]) | {
        "cold_first_s": percentiles(e.first_s for e in cold), "first_ratio": round(ratio, 4),
        "later_first_s": percentiles(e.first_s for e in later), "cached_share": round(min(shares), 4),
        "same_text": None if again is None else again.text == last.text,
        "good": again is None or again.text == last.text,
    }  # fmt: skip


async def _without_cache(bench: Bench, asked: list[dict[str, str]]) -> Exchange | None:
    """The same request once nothing of it is cached; None: other prompts did not bring that about."""
    end = time.monotonic() + bench.options.limit / 2
    for number in range(FLOOD):
        if time.monotonic() > end:
            break
        await bench.ask(bench.prompt(min(HISTORY, bench.options.long_tokens)), 2)
        bench.draw("other prompts", number + 1, FLOOD)
        if number % 8 == 7:
            again = await bench.ask(asked, 16)
            if again.cached_tokens < COLD * again.prompt_tokens:
                return again
    return None
