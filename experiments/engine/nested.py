"""What a width brings in time: single tokens at several widths in turn, so that neighbours disturb all alike;
wall-clock and processor time a token (medians), and bytes from disk. Of a model that is not cut: as it is.
`--held`: the share of the weights that is in memory; with one width alone, those are what it uses most.

    python -m experiments.engine.nested NESTED-PACK --held .5 --text FILE -o FILE.jsonl"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch

import outsize
from experiments.runs import Row, arguments, record
from outsize.bench.speculate import SpeculateOptions, memory_for
from outsize.engine.model import Model
from outsize.errors import BudgetError
from outsize.forward.full import full
from outsize.forward.span import Span

MORE = 6_000_000  # bytes


class Way:
    """A model at a width, with a text of its own."""

    def __init__(self, name: str, model: Model, width: str | float) -> None:
        self.name, self._model = name, model
        self.width = model.transformer.nested.width(width)
        self._kv, self.at = model.transformer.new_kv(1024), 0
        self.wall, self.cpu, self.read = list[float](), list[float](), list[int]()

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> None:
        transformer, loaded = self._model.transformer, self._model.transformer.loaded
        before = loaded.stats.bytes_read + loaded.expert_stats.bytes_read
        wall, cpu = time.perf_counter(), time.process_time()
        span = Span(self.at, tokens[self.at : self.at + 1], width=self.width)
        full(transformer, [span], [self._kv])
        self.at += 1
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        self.read.append(loaded.stats.bytes_read + loaded.expert_stats.bytes_read - before)

    def row(self, round_tokens: int) -> Row:
        """Without the first quarter of each round."""
        rows = [i for i in range(len(self.wall)) if i % round_tokens >= round_tokens // 4]
        return {
            "executed": 1.0 if self.width is None else round(self.width.executed, 4),
            "wall_ms": round(1e3 * statistics.median(self.wall[i] for i in rows), 3),
            "cpu_ms": round(1e3 * statistics.median(self.cpu[i] for i in rows), 3),
            "read_mb": round(statistics.mean(self.read[i] for i in rows) / 1e6, 3),
            "tokens": len(rows),
        }  # fmt: skip


def _opened(name: str, memory: str, how: tuple[int, str, str]) -> Model:
    """What a process takes besides the weights shows only once it runs: more where it is too little."""
    threads, width, experts = how
    for more in (0, 1, 2, 3):
        given = memory if memory == "auto" else str(int(memory) + more * MORE)
        try:
            return outsize.load(name, memory=given, context=1024, draft="none", prefix_cache="off",
                                threads=threads, width=width, experts=experts or None,
                                quiet=True)  # fmt: skip
        except BudgetError as e:
            last = e
    raise last


def main() -> None:
    args = arguments(__doc__, "model", memory="auto", held=1.0, text=Path, tokens=64, name="smol",
                     widths="full,0.75,0.5,0.3", threads=2, rounds=3, machine="busy",
                     experts="")  # fmt: skip
    text = args.text.read_text()[:20_000]
    how = SpeculateOptions(args.text, "none", memory=args.memory, held=args.held, context=1024)
    only = args.widths if "," not in args.widths else "full"
    with _opened(
        args.model, memory_for(args.model, how), (args.threads, only, args.experts)
    ) as model:
        is_cut = bool(model.transformer.nested.count)
        ways = [Way(w, model, w) for w in (args.widths.split(",") if is_cut else ["full"])]
        tokens = model.tokens.encode(text)[:1000]
        for _ in range(args.rounds):
            for way in ways:
                for _ in range(args.tokens):
                    way.step(tokens)
        held = 1 - model.placement.streamed / max(1, model.pack.size)
        for way in ways:
            said = {
                "model": args.name, "width": way.name if is_cut else "dense", "threads": args.threads,
                "memory_mb": round(model.placement.budget / 1e6, 1), "held": round(held, 3),
                "machine": args.machine, "experts": args.experts,
            }  # fmt: skip
            record({**said, **way.row(args.tokens)}, args.output)


if __name__ == "__main__":
    main()
