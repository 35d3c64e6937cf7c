"""Half of the weights in memory:
`python -m experiments.serve.half MODEL [--wrap 'COMMAND {bytes}'] [-o FILE.jsonl]`.

Some numbers of streams in turn on one server (how much more than one do many give, when a step reads what is
missing once for all?); or, with `--soak SECONDS`, many clients for that time: errors, memory, its slope. The
server says what it holds; its budget is set so that this is the share that was asked for. `--wrap` caps its
memory, page cache included, at that budget (docs/testing.md).
"""

from __future__ import annotations

import asyncio
import shlex
from dataclasses import replace
from pathlib import Path

from experiments.runs import WRAP, Row, arguments, record
from outsize.bench.serve import show
from outsize.bench.serve.bench import Bench
from outsize.bench.serve.events import at
from outsize.bench.serve.options import ServeOptions
from outsize.bench.serve.process import Server
from outsize.errors import UnavailableError
from outsize.plan import probe

NEAR = 0.03  # of the share that is asked for: a layer of a small model is as much
TRIES = 4


def bench_of(model: str, options: ServeOptions, how: Row) -> Bench:
    """A server in a budget, capped at it."""
    flags = [f"--memory={how['memory']}", f"--context={how['context']}", "-q"]
    flags += [f"--streams={max(options.stream_counts())}", *shlex.split(how["serve"])]
    wrap = shlex.split(how["wrap"].format(bytes=how["memory"])) if how["memory"] != "auto" else []
    return Bench(options, lambda more: Server.of_outsize(model, [*flags, *more], wrap))


async def placed(bench: Bench) -> Row:
    """What the server says of where its weights are."""
    found = await bench.get("/v1/placement")
    keys = (
        "budget_bytes",
        "planned_bytes",
        "process_bytes",
        "least_bytes",
        "held_bytes",
        "streamed_bytes",
    )
    told: Row = {key: at(found.payload, key) for key in keys}
    if told["held_bytes"] is None:
        raise UnavailableError(
            f"the server does not say what it holds: {found.error or found.payload}"
        )
    return told | {"held_share": told["held_bytes"] / (told["held_bytes"] + told["streamed_bytes"])}


async def opened(model: str, options: ServeOptions, how: Row, share: float) -> tuple[Bench, Row]:
    """A server that holds the share: tried, and its budget corrected by what is missing."""
    bench = bench_of(model, options, how | {"memory": "auto"})
    memory = 0
    for _ in range(TRIES):
        await bench.start()
        told = await placed(bench)
        over = told["held_share"] - share
        if memory and abs(over) < NEAR:
            return bench, told
        bench.close()
        weights = told["held_bytes"] + told["streamed_bytes"]
        memory = int((memory or told["planned_bytes"]) - over * weights)
        bench = bench_of(model, options, how | {"memory": memory})
    await bench.start()
    return bench, await placed(bench)


async def measured(model: str, options: ServeOptions, how: Row, share: float) -> list[Row]:
    """Rows of the loads, each with what was held."""
    bench, told = await opened(model, options, how, share)
    try:
        about = {
            "model_file": Path(model).name,
            "processor": probe.processor(),
            "serve": how["serve"],
            **told,
        }
        rows = [about | row async for row in show.measure(bench)]
    finally:
        status = bench.close()
    return [row | {"status": status} for row in rows]


def main() -> None:
    a = arguments(
        __doc__, "model", wrap=WRAP, share=0.5, context=1024, streams="1,16", repeats=5,
        requests=(16, "of each number of streams, in all"), new=(64, "tokens of a reply"),
        soak=(0.0, "seconds"), clients=(64, "of the soak"), serve=("", "more flags of the server"),
    )  # fmt: skip
    how = {"context": a.context, "wrap": a.wrap, "serve": a.serve}
    options = ServeOptions(
        loads="many", streams=a.streams, requests=a.requests, new_tokens=a.new, repeats=a.repeats,
        limit=3600.0,
    )  # fmt: skip
    if a.soak:
        # The longest prompt fills the context, but for its reply.
        options = replace(
            options, loads="soak", streams=str(a.clients), seconds=a.soak, repeats=1,
            long_tokens=max(1, int(0.9 * (a.context - a.new))), limit=2 * a.soak + 900,
        )  # fmt: skip
    rows = asyncio.run(measured(a.model, options, how, a.share))
    for row in rows:
        record(row, a.output)
    if not a.soak:
        record(gain(rows), a.output)


def gain(rows: list[Row]) -> Row:
    """How much more the most streams give than the fewest, turn by turn."""
    counts = sorted({row["streams"] for row in rows})
    rates = {n: [row["tokens_per_s"] for row in rows if row["streams"] == n] for n in counts}
    pairs = zip(rates[counts[-1]], rates[counts[0]], strict=True)
    ratios = sorted(round(many / one, 3) for many, one in pairs)
    return {
        "model_file": rows[0]["model_file"], "held_share": rows[0]["held_share"],
        "serve": rows[0]["serve"], "streams": counts,
        "tokens_per_s": {str(n): rates[n] for n in counts}, "ratio": ratios[len(ratios) // 2],
        "ratio_min": ratios[0], "ratio_max": ratios[-1],
    }  # fmt: skip


if __name__ == "__main__":
    main()
