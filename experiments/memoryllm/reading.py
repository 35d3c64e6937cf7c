"""The reading path at 1B shapes: `python -m experiments.memoryllm.reading PACKS.json TOKENS.gguf TEXT
OTHER... -o ROWS.jsonl [--tokens 1000] [--shares 1 2 5 10 20]`; PACKS.json: of full_size.py.

Rows of 24 layers of 2,048 numbers in 4.5 bits (28 KiB, random values), one for each of 128,256 tokens,
ordered by their use in the first 65,536 of TEXT. Each stream of real tokens (what follows in TEXT, and each
OTHER from its beginning) goes through a cache of such a share of the rows, one token after another, as
decoding asks for them: hits, reads and bytes a token, and the time from asking for a token's row to all its
layers' numbers decoded (median and 95th of a hundred; of all, of hits and of misses alone). And 512 of the
tokens as a prompt of which nothing is held but the rows that the cache begins with.

Also, counted without reading: how often a fixed choice of the rows that TEXT uses most would have hit (the
paper's), and least frequently used ones leaving first.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from experiments.memoryllm.full_size import ORDERED, SIZE, by_use, stream
from experiments.runs import Row, arguments, record
from outsize.caching.policy import Hints, make
from outsize.kernels.find import find
from outsize.log import silent
from outsize.pack.format import Pack, read_header
from outsize.storage.reader import Reader
from outsize.storage.stats import IOStats
from outsize.storage.table import Table
from outsize.weights.tokens import POLICY, TokenCache, TokenTable

PROMPT, BLOCK = 512, 512


@contextmanager
def opened(pack: Pack, slots: int, row_V: torch.Tensor) -> Iterator[TokenTable]:
    """The pack's table with its first rows in so many slots."""
    (header,) = [t for t in pack.tables if t.kind == "tokens"]
    table = Table(pack.path, header, IOStats(), "first")
    with Reader(backend=find(True, silent)) as reader:
        cache = TokenCache(table, reader, partial(make, POLICY, slots, Hints()), slots)
        for at in range(slots, 0, -BLOCK):
            cache.load(range(at - 1, max(0, at - BLOCK) - 1, -1), lambda _: None)
        yield TokenTable(cache, row_V)
    table.close()


def timed(table: TokenTable, ids: Sequence[int]) -> Row:
    """One stream, token by token."""
    stats, seconds, missed = table.cache.stats, list[float](), list[bool]()
    begin = stats.bytes_read
    for token in ids:
        at, before = time.perf_counter(), stats.misses
        table.ask([token]).part(slice(0, 1)).numbers(0)
        seconds.append(time.perf_counter() - at)
        missed.append(stats.misses > before)
    one = torch.tensor(seconds, dtype=torch.float64, device="cpu") * 1e6
    is_miss, share = torch.tensor(missed, device="cpu"), sum(missed) / len(ids)
    return {
        "hit_rate": round(1 - share, 4), "reads_per_token": round(share, 4),
        "bytes_per_token": round((stats.bytes_read - begin) / len(ids)),
        **_times("us", one), **_times("hit_us", one[~is_miss]), **_times("miss_us", one[is_miss]),
    }  # fmt: skip


def _times(name: str, of: torch.Tensor) -> Row:
    if not len(of):
        return {}
    shares = {"p50": 0.5, "p95": 0.95}
    return {f"{name}_{p}": round(float(of.quantile(q)), 1) for p, q in shares.items()}


def prompt_s(table: TokenTable, ids: Sequence[int]) -> Row:
    """A prompt's rows, of which those are in memory that a cache begins with."""
    stats = table.cache.stats
    begin, at = stats.bytes_read, time.perf_counter()
    recalled = table.ask(ids).part(slice(0, len(ids)))
    for layer in range(SIZE.layers):
        recalled.numbers(layer)
    return {
        "prompt_tokens": len(ids), "distinct": len(set(ids)),
        "prompt_s": round(time.perf_counter() - at, 4), "prompt_bytes": stats.bytes_read - begin,
    }  # fmt: skip


def counted(policy: str, slots: int, rows: Sequence[int]) -> float:
    """The hit rate of a policy whose cache begins with the first rows, of which "fixed" keeps all."""
    if policy == "fixed":
        return round(sum(row < slots for row in rows) / len(rows), 4)
    made, hits = make(policy, slots, Hints()), 0
    for row in range(slots)[::-1]:
        made.place([row])
    for row in rows:
        hits += not made.place([row]).loads
    return round(hits / len(rows), 4)


def main() -> None:
    told = arguments(
        __doc__, "packs", "model", "texts+", tokens=1000, shares=[1, 2, 5, 10, 20], counted=ORDERED
    )
    pack = read_header(Path(json.loads(Path(told.packs).read_text())["table"]))
    found = {
        Path(text).name.split(".")[0]: stream(Path(told.model), Path(text), 2 * ORDERED)
        for text in told.texts
    }
    first = next(iter(found))
    order = torch.tensor(by_use(found[first][:ORDERED]), device="cpu")
    row_V = torch.empty_like(order)
    row_V[order] = torch.arange(len(order), device="cpu")
    found[first] = found[first][ORDERED:]
    for name, all_ids in found.items():
        ids = all_ids[: told.counted]
        rows = row_V[torch.tensor(ids, device="cpu")].tolist()
        for share in told.shares:
            slots = SIZE.vocab * share // 100
            row: Row = {"text": name, "share": share, "stream": len(ids), "tokens": told.tokens}
            row |= {"slots": slots, "rows": SIZE.vocab, "held_mb": round(slots * 28_672 / 1e6, 1)}
            row |= {p: counted(p, slots, rows) for p in ("fixed", "lfu", "lru")}
            with opened(pack, slots, row_V) as table:
                row |= {"row_bytes": table.cache.table.header.stride}
                row |= prompt_s(table, ids[:PROMPT])
            with opened(pack, slots, row_V) as table:
                row |= timed(table, ids[: told.tokens])
            record(row | {"load": float(Path("/proc/loadavg").read_text().split()[0])}, told.output)


if __name__ == "__main__":
    main()
