"""`outsize bench serve`: how a server does under load. A table, then one JSON object a line."""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from typing import Any

from outsize.bench.serve import loads, trials
from outsize.bench.serve.bench import Begin, Bench
from outsize.bench.serve.in_process import InProcess
from outsize.bench.serve.options import ServeOptions
from outsize.bench.serve.process import Server
from outsize.bench.serve.summary import Row
from outsize.errors import OptionError
from outsize.options import LoadChanges, LoadOptions
from outsize.progress import steps

Load = Callable[[Bench, int], Awaitable[Row]]
LOADS: dict[str, Load] = {
    "one": loads.one, "many": loads.many, "batch": loads.batch, "long": loads.long, "idle": loads.idle,
    "prefix": loads.prefix, "disconnects": trials.disconnects, "soak": trials.soak,
    "overload": trials.overload, "hostile": trials.hostile, "bits": trials.bits,
}  # fmt: skip
OF_STREAMS = "many", "batch", "soak", "bits"  # differ with the number of clients
# What a load has besides, worth a line for a person.
NOTES = (
    "ratio", "in_process_tokens_per_s", "later_s", "same_texts", "p95_to_p50", "p99_to_p50", "kept",
    "largest_gap_s", "first_ratio", "cached_share", "same_text", "left", "idle_s", "next_s", "grown_bytes",
    "bytes_per_s", "group_peak_bytes", "refused", "refused_s", "late", "statuses", "bad_count", "bad", "slow",
    "differ_company", "differ_later", "differ_no_drafts",
)  # fmt: skip


async def measure(bench: Bench) -> AsyncIterator[Row]:
    """A row for each load, for each number of streams that it depends on, in turn."""
    o = bench.options
    counts, names = o.stream_counts(), o.load_names(LOADS)
    for turn in range(o.repeats):
        for name in names:
            for streams in counts if name in OF_STREAMS else counts[:1]:
                yield {"load": name, "streams": streams, "turn": turn} | await _row(
                    bench, name, streams
                )


async def _row(bench: Bench, name: str, streams: int) -> Row:
    """One load, ended when its time is over."""
    bench.memory.samples.clear()
    try:
        async with asyncio.timeout(bench.options.limit):
            row = await LOADS[name](bench, streams)
    except TimeoutError:
        return {"errors": {"not done in time": 1}, "seconds": bench.options.limit, "good": False}
    row.setdefault("good", True)
    row["good"] = bool(row["good"] and not row["errors"])
    memory = bench.memory
    return row | {
        "memory_bytes": memory.sample(), "most_bytes": memory.most, "peak_rss_bytes": memory.peak(),
        "group_peak_bytes": memory.group_peak(), "model": bench.name,
    }  # fmt: skip


def show(model: str, options: ServeOptions, load: LoadOptions, as_json: bool) -> bool:
    """Measure and print; with as_json nothing but one JSON object a line. Was every load good? Raises
    OptionError, UnavailableError."""
    if load.context is not None and load.context <= options.long_tokens and _has_long(options):
        raise OptionError(
            f"long_tokens is {options.long_tokens:,}, which the context of {load.context:,} does not hold; "
            "give fewer, or a larger --context"
        )
    return asyncio.run(_show(Bench(options, begin_of(model, options, load)), model, load, as_json))


def begin_of(model: str, options: ServeOptions, load: LoadOptions) -> Begin | None:
    """Starts `outsize serve` as the options say; None: there is one at options.url."""
    if options.url:
        return None
    told, wrap = options.server_flags(load), shlex.split(options.wrap)
    return lambda flags: Server.of_outsize(model, [*told, *flags], wrap)


def _has_long(options: ServeOptions) -> bool:
    return bool({"long", "prefix", "soak"} & set(options.load_names(LOADS)))


async def _show(bench: Bench, model: str, load: LoadOptions, as_json: bool) -> bool:
    all_good = True
    with ExitStack() as open_now, steps(load.quiet or as_json) as draw:
        open_now.callback(bench.close)
        bench.draw = draw
        await bench.start()
        if bench.options.in_process:
            bench.in_process = open_now.enter_context(InProcess(model, _opened(bench, load)))
        rows = list[Row]()
        async for row in measure(bench):
            rows.append(row)
            all_good = all_good and row["good"]
            if as_json:
                print(json.dumps(row), flush=True)
        about = "" if bench.in_process is None else f"; in process: {bench.in_process.about}"
    if not as_json:
        print(f"{bench.name} at {bench.address.host}:{bench.address.port}{about}")
        print("\n".join([HEAD, *(line for row in rows for line in lines(row))]))
        print("\n".join(map(json.dumps, rows)))
    return all_good


def _opened(bench: Bench, load: LoadOptions) -> LoadChanges:
    """How the model beside the server is opened."""
    how: LoadChanges = {
        "memory": load.memory, "context": load.context, "threads": load.threads, "draft": load.draft,
        "streams": max(bench.options.stream_counts()), "quiet": True,
    }  # fmt: skip
    return how


HEAD = (
    f"{'load':>12} {'streams':>7} {'requests':>8}  {'first token p50/p95/p99 s':>26}  "
    f"{'gap p50/p95/p99 ms':>22}  {'tokens/s':>8}  {'MB':>6}  "
)


def lines(row: Row) -> list[str]:
    """A row of the table, and what else there is to say."""
    if "requests" not in row:
        return [f"{row['load']:>12} {row['streams']:>7}  not done in {row['seconds']:g} s"]
    memory = row.get("memory_bytes")
    told = (
        f"{row['load']:>12} {row['streams']:>7} {row['requests']:>8}  "
        f"{_three(row['first_token_s'], 1, 3):>26}  {_three(row['gap_s'], 1000, 1):>22}  "
        f"{row['tokens_per_s']:8.1f}  {'' if memory is None else f'{memory / 1e6:.0f}':>6}  "
        f"{'' if row['good'] else 'NOT GOOD'}"
    )
    notes = {key: row[key] for key in NOTES if row.get(key) not in (None, [], {})}
    if row["errors"]:
        notes["errors"] = row["errors"]
    return [told.rstrip(), *(f"{'':>13}{key}: {value}" for key, value in notes.items())]


def _three(found: Any, unit: float, digits: int) -> str:
    if not found:
        return ""
    return " / ".join(f"{found[p] * unit:.{digits}f}" for p in ("p50", "p95", "p99"))
