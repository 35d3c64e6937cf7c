"""Requests that share beginnings, at a hard cap: `python -m experiments.memory.prefixes MODEL --memory BYTES
[--wrap 'COMMAND {bytes}'] [--requests 200] [--streams 4] -o FILE`.

A service answers them, several at once: a few documents of different lengths, each with many questions, kept
in memory and on disk; every tenth asks for the whole context. Memory is noted after each; in the end every
fifth answer is compared with one that was computed alone, with nothing kept. One JSON line (`grown_bytes`:
the median of the last quarter less that of the second); exit status 1 if any was wrong, memory grew, or the
budget was not kept.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from statistics import median

import outsize
from experiments.runs import HIDDEN, WRAP, Row, arguments, fresh, good, record
from outsize.engine.batch import Batch
from outsize.engine.service import Limits, Service
from outsize.options import Options
from outsize.system.memory import peak, resident

CONTEXT, NEW, DOCUMENTS, CHUNK, GROWTH = 1024, 8, 6, 128, 0.01
EVERY = 5  # requests of which one is computed again, alone


def prompts(vocabulary: int, count: int) -> list[list[int]]:
    draw = random.Random(0)
    lengths = [draw.randrange(150, 600) for _ in range(DOCUMENTS)]
    documents = [draw.choices(range(vocabulary), k=n) for n in lengths]
    out = []
    for i in range(count):
        ids = list(draw.choice(documents))
        whole = CONTEXT - NEW - len(ids) if i % 10 == 9 else draw.randrange(1, 80)
        out.append(ids + draw.choices(range(vocabulary), k=whole))
    return out


async def ask(
    service: Service, asked: list[list[int]], streams: int
) -> tuple[list[Row], list[list[int]]]:
    """What memory was after each, and the tokens of each."""
    rows: list[Row] = []
    texts: list[list[int]] = [[] for _ in asked]
    limit = asyncio.Semaphore(2 * streams)

    async def one(number: int) -> None:
        async with limit:
            answer = await service.ask(asked[number], options(number))
            async for _ in answer:
                pass
            texts[number] = answer.request.seq.new_tokens
            load = service.load()
            rows.append({"reused": answer.request.cached, "read": answer.request.traffic.read,
                         "resident": resident(), "kept_tokens": load.prefix_tokens})  # fmt: skip

    await asyncio.gather(*(one(i) for i in range(len(asked))))
    return rows, texts


def options(seed: int) -> Options:
    return Options(max_tokens=NEW, ignore_eos=True, temperature=1.0, seed=seed)


def child(model: str, memory: int, requests: int, streams: int) -> Row:
    how = {"context": CONTEXT, "streams": streams, "chunk": CHUNK, "memory": memory, "quiet": True}
    with outsize.load(model, prefix_cache="disk:2GB,writes=100GB", **how) as m:
        service = Service(m, Limits(streams, requests))
        asked = prompts(m.pack.description.vocab_size, requests)
        rows, texts = asyncio.run(ask(service, asked, streams))
        had, room, held = peak(), m.placement.kv_tokens, m.placement.streamed == 0
        service.close()
        m.scheduler.settle()
        m.scheduler.prefixes = None
        looked = range(0, requests, EVERY)
        wrong = sum(alone(m, asked[i], i) != texts[i] for i in looked)
        name = m.name
    at, quarter = [r["resident"] for r in rows], len(rows) // 4
    kept = [r["kept_tokens"] for r in rows]
    return {
        "model": name, "requests": requests, "streams": streams, "context": CONTEXT,
        "wrong": wrong, "compared": len(looked),
        "all_held": held, "peak_bytes": had, "kv_room_tokens": room, "kept_most": max(kept),
        "kept_least_later": min(kept[quarter:]), "reused_tokens": sum(r["reused"] for r in rows),
        "prompt_tokens": sum(map(len, asked)), "read_bytes": sum(r["read"] for r in rows),
        "grown_bytes": int(median(at[-quarter:]) - median(at[quarter : 2 * quarter])),
    }  # fmt: skip


def alone(m: outsize.Model, ids: list[int], seed: int) -> list[int]:
    request = m.start(list(ids), options(seed))
    batch = Batch(m.scheduler)
    batch.add(request)
    while batch.step():
        request.advance(0.0)
    return request.seq.new_tokens


def main() -> None:
    a = arguments(__doc__, "model", memory=int, wrap=WRAP, requests=200, streams=4, child=HIDDEN)
    if a.child:
        print(json.dumps(child(a.model, a.memory, a.requests, a.streams)))
        return
    me = ["-m", "experiments.memory.prefixes", a.model, "--memory", str(a.memory), "--child"]
    me += ["--requests", str(a.requests), "--streams", str(a.streams)]
    row = good(fresh(*me, wrap=a.wrap, cap=a.memory))
    grew = row["grown_bytes"] > GROWTH * a.memory
    row["good"] = (
        row["status"] == 0 and not row["wrong"] and not grew and row["peak_bytes"] <= a.memory
    )
    record({"budget_bytes": a.memory} | row, a.output)
    sys.exit(not row["good"])


if __name__ == "__main__":
    main()
