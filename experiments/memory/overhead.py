"""What the paging machinery costs where all weights are in memory:
`python -m experiments.memory.overhead MODEL...`.

Steps of one token through the parts as they are (each asks whether its weights are held, passes are counted,
free memory is watched), and through the same layers called bare; in turn, in one process. One JSON object
a model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import outsize
from experiments.runs import arguments, compared, record
from outsize.forward import full as passes
from outsize.forward.span import Span

TURNS, STEPS = 60, 8


def main() -> None:
    a = arguments(__doc__, "models+")
    for name in a.models:
        record(measured(name), a.output)


def measured(name: str) -> dict[str, object]:
    with outsize.load(name, quiet=True, draft="none") as m:
        model, paged = m.transformer, passes._run
        halves = [part.resident for part in model.paged_layers]
        assert all(halves), "not all weights are in memory"

        def bare(model, h_TD, steps) -> None:  # type: ignore[no-untyped-def]
            chunks = [(h_TD[rows], step) for rows, step in steps]
            for half in halves:
                half.run(chunks)

        kv = model.new_kv(400)
        passes.full(model, [Span(0, range(100, 356))], [kv])

        def seconds(run: Callable[..., None]) -> float:
            passes._run = run
            started = time.perf_counter()
            for _ in range(STEPS):
                passes.full(model, [Span(256, [7])], [kv])
            return (time.perf_counter() - started) / STEPS

        seconds(paged), seconds(bare)
        pairs = [
            (seconds(paged), seconds(bare)) if i % 2 else (seconds(bare), seconds(paged))[::-1]
            for i in range(TURNS)
        ]
        passes._run = paged
        found = compared([a for a, _ in pairs], [b for _, b in pairs])
        return {
            "model": m.name, "paged_ms": 1e3 * found["ours"], "bare_ms": 1e3 * found["theirs"],
            "median_ratio": found["ratio"],
            "quartiles": statistics.quantiles((a / b for a, b in pairs), n=4),
        }  # fmt: skip


if __name__ == "__main__":
    main()
