"""The reading path at 1B shapes: `python -m experiments.memoryllm.reading FOLDER MODEL.gguf TEXT OTHER... -o
ROWS.jsonl [--tokens 1000] [--shares 1 2 5 10 20]`.

Rows of 24 layers of 2,048 numbers in 4.5 bits (28 KiB, random values), a row a token of MODEL's
vocabulary, ordered by their use in the first half of TEXT. Each stream of real tokens (the other half of
TEXT, and each OTHER) goes through a cache of such a share of the rows, one token after another, as decoding
asks for them: hits, reads and bytes a token, and the seconds from asking for a token's row to all its
layers' numbers decoded (median and 95th of a hundred; of hits and of misses alone). And 512 of the tokens as
a prompt, cold.

Also, counted without reading: how often a fixed choice of the rows that TEXT uses most would have hit (the
paper's), and least frequently used ones leaving first.
"""

from __future__ import annotations

import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

from experiments.runs import Row, arguments, record
from outsize.caching.policy import Hints, make
from outsize.checkpoint import tokenizer as tokenizers
from outsize.checkpoint.bounded import text_lines
from outsize.checkpoint.opening import open_checkpoint
from outsize.errors import DataError
from outsize.kernels.find import find
from outsize.log import silent
from outsize.pack.kinds.tokens import NAME, layout
from outsize.pack.tables import TableHeader, field_bytes
from outsize.storage.reader import Reader
from outsize.storage.stats import IOStats
from outsize.storage.table import Table
from outsize.text.prompt_file import read
from outsize.weights.tokens import POLICY, TokenCache, TokenTable

LAYERS, WIDTH, ENCODING = 24, 2048, "group4"
PROMPT, MOST, BLOCK = 512, 1 << 16, 512
SCALE = np.float16(0.01)


def table_at(folder: Path, size: int) -> TableHeader:
    """A table of `size` rows of random codes, written once a run."""
    laid, stride, _ = layout([WIDTH] * LAYERS, ENCODING)
    (matrix,) = laid["rows"]
    first, random, sums = matrix.offsets()["scale"], np.random.default_rng(0), list[int]()
    scales = np.full(field_bytes(matrix.specs["scale"]) // 2, SCALE).view(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{NAME}-0.records", "wb") as file:
        for at in range(0, size, BLOCK):
            count = min(BLOCK, size - at)
            rows = (
                np.frombuffer(random.bytes(count * stride), np.uint8).reshape(count, stride).copy()
            )
            rows[:, first : first + len(scales)] = scales
            sums += [zlib.crc32(row.tobytes()) for row in rows]
            file.write(rows.tobytes())
    return TableHeader(f"{NAME}-0", "tokens", tuple(range(size)), stride, laid, tuple(sums), size)


@contextmanager
def opened(
    folder: Path, header: TableHeader, slots: int, order: torch.Tensor
) -> Iterator[TokenTable]:
    """The table with its first rows in so many slots."""
    table = Table(folder, header, IOStats(), "first")
    with Reader(backend=find(True, silent)) as reader:
        cache = TokenCache(table, reader, partial(make, POLICY, slots, Hints()), slots)
        for at in range(slots, 0, -BLOCK):
            cache.load(range(at - 1, max(0, at - BLOCK) - 1, -1), lambda _: None)
        yield TokenTable(cache, order)
    table.close()


def timed(table: TokenTable, ids: Sequence[int]) -> Row:
    """One stream through a fresh cache, and then a prompt."""
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
        "bytes_per_token": round((stats.bytes_read - begin) / len(ids)), "slots": table.cache.slots,
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
    for layer in range(LAYERS):
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


def streams(model: Path, texts: Sequence[Path]) -> dict[str, list[int]]:
    """The first tokens of each text."""
    tokens, out = tokenizers.build(open_checkpoint(model).tokenizer), {}
    for path in texts:
        lines = (
            [f"{line.prompt}\n{line.answer or ''}" for line in read([path])]
            if ".jsonl" in path.suffixes
            else text_lines(path, DataError)
        )
        found: list[int] = []
        for line in lines:
            found += tokens.encode(line + "\n", add_special_tokens=False).ids
            if len(found) >= 2 * MOST:
                break
        out[path.name.split(".")[0]] = found
    return out


def main() -> None:
    told = arguments(__doc__, "folder", "model", "texts+", tokens=1000, shares=[1, 2, 5, 10, 20])
    found = streams(Path(told.model), [Path(text) for text in told.texts])
    size, first = 49_152, next(iter(found))
    counts = Counter(found[first][:MOST])
    order = sorted(range(size), key=lambda token: (-counts[token], token))
    row_V = torch.empty(size, dtype=torch.int64, device="cpu")
    row_V[torch.tensor(order, device="cpu")] = torch.arange(size, device="cpu")
    found[first] = found[first][MOST:]
    folder = Path(told.folder)
    header = table_at(folder, size)
    for name, all_ids in found.items():
        ids = all_ids[:MOST]
        rows = row_V[torch.tensor(ids, device="cpu")].tolist()
        for share in told.shares:
            slots = size * share // 100
            row: Row = {"text": name, "share": share, "stream": len(ids), "tokens": told.tokens}
            row |= {"row_bytes": header.stride, "rows": size}
            row |= {p: counted(p, slots, rows) for p in ("fixed", "lfu", "lru")}
            with opened(folder, header, slots, row_V) as table:
                row |= prompt_s(table, ids[:PROMPT])
            with opened(folder, header, slots, row_V) as table:
                row |= timed(table, ids[: told.tokens])
            record(row | {"load": float(Path("/proc/loadavg").read_text().split()[0])}, told.output)
    (folder / f"{NAME}-0.records").unlink()


if __name__ == "__main__":
    main()
