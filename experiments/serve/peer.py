"""Ours and llama-server, in turn, on one file: `python -m experiments.serve.peer FILE.gguf --server PATH
[--shares 0 0.6] [--wrap 'COMMAND {bytes}'] [-o FILE.jsonl]`.

Each pair is two fresh servers, one after the other, under the same clients: some numbers of streams, short
prompts, arrivals spread. With `--shares` both are capped at these shares of the file, page cache included
(`--wrap`; 0: no cap). llama-server gets a slot a stream, as much context a slot as ours, and no cache of old
prompts beside them; under a cap its weights stay in the mapped file (--no-repack), which is what lets it run.
One JSON object a line: for each number of streams the medians, and the ratios pair by pair.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

from experiments.runs import WRAP, Row, arguments, compared, record
from outsize.bench.serve import show
from outsize.bench.serve.bench import Bench
from outsize.bench.serve.client import Address
from outsize.bench.serve.options import ServeOptions
from outsize.bench.serve.process import LOOPBACK, Server, free_port
from outsize.errors import UnavailableError
from outsize.plan import probe

Side = Callable[[argparse.Namespace, int], Server]


def prefix(a: argparse.Namespace, cap: int) -> list[str]:
    return shlex.split(a.wrap.format(bytes=cap)) if cap else []


def ours(a: argparse.Namespace, cap: int) -> Server:
    flags = [
        f"--context={a.context}",
        f"--streams={max(a.streams)}",
        f"--threads={a.threads}",
        "-q",
    ]
    flags += [f"--memory={cap}"] * (cap > 0) + shlex.split(a.ours)
    return Server.of_outsize(a.model, flags, prefix(a, cap))


def theirs(a: argparse.Namespace, cap: int) -> Server:
    port, slots = free_port(), max(a.streams)
    words = [a.server, "-m", a.model, "--host", LOOPBACK, "--port", str(port), "-np", str(slots)]
    words += ["-c", str(slots * a.context), "-t", str(a.threads), "--no-ui", "--cache-ram", "0"]
    words += ["--no-repack"] * (cap > 0 and not a.as_it_comes) + shlex.split(a.theirs)
    return Server([*prefix(a, cap), *words], Address(LOOPBACK, port))


async def side(a: argparse.Namespace, begin: Callable[[], Server]) -> list[Row]:
    """A server under each number of streams; a row that says why, where it fails."""
    streams = ",".join(map(str, a.streams))
    bench = Bench(
        ServeOptions(
            loads="many", streams=streams, requests=a.requests, new_tokens=a.new, limit=a.limit
        ),
        lambda more: begin(),
    )
    try:
        await bench.start()
        return [row async for row in show.measure(bench)]
    except UnavailableError as e:
        return [{"streams": n, "errors": {str(e)[-300:]: 1}} for n in a.streams]
    finally:
        bench.close()


KEYS: dict[str, Callable[[Row], float]] = {
    "tokens_per_s": lambda row: row["tokens_per_s"],
    "gap_p95_s": lambda row: row["gap_s"]["p95"],
    "first_token_p50_s": lambda row: row["first_token_s"]["p50"],
}


def told(found: list[tuple[Row, Row]]) -> Row:
    """Of the pairs of one number of streams in which nothing went wrong."""
    good = [pair for pair in found if not any(row["errors"] for row in pair)]
    out: Row = {"pairs": len(good)}
    for key, of in KEYS.items():
        out[key] = compared([of(o) for o, _ in good], [of(t) for _, t in good])
    out["ended"] = [row["errors"] for pair in found for row in pair if row["errors"]]
    for who, name in enumerate(("ours", "theirs")):
        out[f"{name}_peak_bytes"] = [pair[who].get("group_peak_bytes") for pair in good]
        out[f"{name}_memory_bytes"] = [pair[who].get("memory_bytes") for pair in good]
    return out


def main() -> None:
    a = arguments(
        __doc__, "model", wrap=WRAP, server=str, pairs=3, streams=[1, 4, 16], shares=[0.0], context=1024,
        requests=(32, "of each number of streams, in all"), new=(96, "tokens of a reply"), threads=2,
        limit=1800.0, ours=("", "more flags of ours, as one text"), theirs=("", "and of theirs"),
        as_it_comes=(False, "llama-server without --no-repack, under a cap, too"),
    )  # fmt: skip
    sides: tuple[Side, Side] = ours, theirs
    for share in a.shares:
        cap = int(share * Path(a.model).stat().st_size)
        rows = [
            [asyncio.run(side(a, partial(begin, a, cap))) for begin in sides]
            for _ in range(a.pairs)
        ]
        for number, streams in enumerate(a.streams):
            found = [(pair[0][number], pair[1][number]) for pair in rows]
            about = {"model": Path(a.model).name, "share": share, "cap": cap, "streams": streams}
            about |= {"threads": a.threads, "processor": probe.processor()}
            record(about | told(found), a.output)


if __name__ == "__main__":
    main()
