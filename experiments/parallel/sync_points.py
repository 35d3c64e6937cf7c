"""What sums between ranks may lose: perplexity with low bits, and with sums left out, of a real model.

    python -m experiments.parallel.sync_points MODEL.gguf TEXT.txt --ranks 3 [-o FILE]

One process computes every rank's parts of every layer (simulated.py), and adds them up as the collectives of
outsize/parallel would: Turned, Static, Drop with and without its correction. A row for each way: perplexity
on the text's beginning, its change against exact sums in per cent with an interval of two standard errors
(over chunks, paired), and how often the most likely token is the same. Steps, kept features, corrections and
the order of layers are from the text's second half alone. Ways whose rows FILE has are not measured again.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.parallel.simulated import Ranks, Sums, Way, coded, losses, tokens, zero_shot
from experiments.runs import arguments, record, recorded
from outsize.kernels.find import find
from outsize.kernels.turned import turner
from outsize.parallel.collective import Point
from outsize.parallel.dropped import Correction, Drop, Fit
from outsize.parallel.exact import sum_in_order
from outsize.parallel.lowbit import Turned
from outsize.parallel.static import Ranges, Static, Table

RANK, FEW = 64, 12  # of corrections; sequences by which two texts' features are compared
GATE = 1.0  # per cent of perplexity, within which layers are chosen


class Calibration:
    """What is learnt beforehand: ranges of every point, corrections of every layer."""

    def __init__(self, ranks: Ranks, chunks: Tensor, fits: bool = True) -> None:
        """`fits`: corrections, too."""
        self.ranks, self.width = ranks, ranks.outputs[0].shape[0]
        num = len(ranks.outputs)
        self.ranges = {
            Point(i, place): Ranges(ranks.world, self.width)  # type: ignore[arg-type]
            for i in range(num)
            for place in ("attention", "ffn")
        }
        self.fits = [
            [Fit(self.width) for _ in range(ranks.world)] for _ in range(num if fits else 0)
        ]
        self.tokens = chunks.numel()
        losses(ranks, chunks, Way("calibration", seen=self.see))

    def see(self, layer: int, place: str, parts: list[Tensor], normed: Tensor) -> None:
        total = sum_in_order(parts)
        for r, part in enumerate(parts):
            self.ranges[Point(layer, place)].see(r, part)  # type: ignore[arg-type]
            if place == "attention" and self.fits:
                self.fits[layer][r].add(normed, part, total - part)

    def static(self, choose: str) -> Sums:
        """`choose`: which features go in 16 bits: selected (the paper), random, or none."""
        dice, tables = random.Random(1), {}
        for at, ranges in self.ranges.items():
            table = ranges.table()
            kept = {
                "selected": table.kept_K,
                "random": torch.tensor(sorted(dice.sample(range(self.width), self.width // 64))),
                "none": torch.empty(0, dtype=torch.int64),
            }[choose]
            tables[at] = Table(table.step_PD, kept)
        return coded([Static(r, tables) for r in range(self.ranks.world)])

    def way(self, choose: str) -> Way:
        return Way(f"static, 16 bits for {choose}", self.static(choose))

    @cached_property
    def corrections(self) -> list[list[Correction]]:
        """By layer and rank."""
        return [[fit.solve(RANK) for fit in fits] for fits in self.fits]

    def corrected(self, layers: Sequence[int]) -> list[Drop]:
        """By rank."""
        return [
            Drop(frozenset(layers), {i: self.corrections[i][r] for i in layers})
            for r in range(self.ranks.world)
        ]

    def same(self, other: Calibration) -> dict[str, float]:
        """How alike the chosen features are (Jaccard, mean over points): between two texts, and ranks."""

        def jaccard(a: Tensor, b: Tensor) -> float:
            x, y = set(a.tolist()), set(b.tolist())
            return len(x & y) / len(x | y)

        texts, between = [], []
        for at, ranges in self.ranges.items():
            texts.append(jaccard(ranges.table().kept_K, other.ranges[at].table().kept_K))
            step, k = ranges.table().step_PD, self.width // 64
            tops = [row.topk(k).indices for row in step]
            between += [jaccard(tops[0], top) for top in tops[1:]]
        return {"alike_texts": sum(texts) / len(texts), "alike_ranks": sum(between) / len(between)}


Made = tuple[str, Callable[[], Way]]


def ways(
    ranks: Ranks, known: Callable[[], Calibration], order: Sequence[int], rises: Sequence[float]
) -> Iterator[Made]:
    """Each made when it is due."""
    num, world, made = len(ranks.outputs), ranks.world, find()
    all_, late = range(num), range(4, num)

    def drops(name: str, layers: Sequence[int]) -> Iterator[Made]:
        plain, fitted = f"dropped: {name}, zero-shot", f"dropped: {name}, closed form"
        yield plain, lambda: Way(plain, drops=zero_shot(layers, world))
        yield fitted, lambda: Way(fitted, drops=known().corrected(layers))

    def turned(name: str, bits: int, *places: str) -> Made:
        codecs = [Turned(turner(bits, made))] * world
        return name, lambda: Way(name, coded(codecs, places) if places else coded(codecs))

    yield from drops("all but the first four", late)
    never = "dropped: all but the first four, never added"
    yield never, lambda: Way(never, drops=zero_shot(late, world), again=False)
    count = within(order, rises)
    yield from drops(f"those within {GATE:g} %: {count}", order[:count])
    for share in (4, 2):
        yield from drops(f"best 1 in {share}", order[: num // share])
    yield from drops("all", all_)
    yield turned("attention whole, turned 4 bits", 4, "ffn")
    yield from (turned(f"turned, {b} bits", b) for b in (4, 5, 6))
    for choose in ("selected", "random", "none"):
        yield f"static, 16 bits for {choose}", lambda choose=choose: known().way(choose)  # type: ignore[misc]


def within(order: Sequence[int], rises: Sequence[float]) -> int:
    """How many layers, those that cost least first, cost no more together than the gate lets them."""
    total = 0.0
    for count, layer in enumerate(order):
        total += max(0.0, rises[layer])
        if total > math.log1p(GATE / 100):
            return count
    return len(order)


def sensitivity(ranks: Ranks, chunks: Tensor) -> list[float]:
    """The rise in loss by each layer dropped alone, zero-shot."""
    base, _ = losses(ranks, chunks, Way("exact"))
    rises = []
    for layer in range(len(ranks.outputs)):
        found, _ = losses(ranks, chunks, Way("", drops=zero_shot([layer], ranks.world)))
        rises.append(sum(found) / len(found) - sum(base) / len(base))
    return rises


def compared(
    way: str, base: tuple[list[float], Tensor], now: tuple[list[float], Tensor]
) -> dict[str, Any]:
    rise = [b - a for a, b in zip(base[0], now[0], strict=True)]
    mean, num = sum(rise) / len(rise), len(rise)
    error = math.sqrt(sum((r - mean) ** 2 for r in rise) / max(num - 1, 1) / num)
    change = [round(100 * math.expm1(mean + s * error), 2) for s in (0, -2, 2)]
    return {
        "way": way, "perplexity": round(math.exp(sum(now[0]) / num), 3), "change": change[0],
        "change_low": change[1], "change_high": change[2], "log_change": round(mean, 5),
        "top1_same": round(float((base[1] == now[1]).float().mean()), 4),
    }  # fmt: skip


class Rows:
    """What is known of a run, and what is added to it. `about`: in each row."""

    def __init__(self, output: Path | None, about: dict[str, Any]) -> None:
        self._output, self._about, self._start = output, about, time.monotonic()
        self.known = {row["way"]: row for row in recorded(output, about)}

    def get(self, way: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of a way, measured where there is none."""
        if way not in self.known:
            spent = round(time.monotonic() - self._start)
            self.known[way] = row = {**self._about, "way": way, **measure(), "seconds": spent}
            record(row, self._output)
        return self.known[way]


def features(ranks: Ranks, learnt: Sequence[Tensor]) -> dict[str, Any]:
    """How alike those are that would go in 16 bits."""
    one, other = (Calibration(ranks, text[:FEW], fits=False) for text in learnt)
    return {"calibration_tokens": one.tokens, **one.same(other)}


def measure(ranks: Ranks, text: Tensor, learnt: list[Tensor], sweep: int, rows: Rows) -> None:
    """Every way, a row each; `learnt`: two calibration texts, of which the first is used."""
    base = losses(ranks, text, Way("exact"))
    rows.get("exact", lambda: compared("exact", base, base))
    swept = rows.get(
        "sweep", lambda: {"rises": [round(r, 5) for r in sensitivity(ranks, learnt[0][:sweep])]}
    )
    rises: list[float] = swept["rises"]
    order = sorted(range(len(rises)), key=rises.__getitem__)
    rows.get("features", lambda: features(ranks, learnt))
    known = cache(lambda: Calibration(ranks, learnt[0]))  # where a way needs it
    for name, make in ways(ranks, known, order, rises):
        rows.get(
            name, lambda name=name, make=make: compared(name, base, losses(ranks, text, make()))
        )  # type: ignore[misc]


def main() -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    args = arguments(__doc__, "model", "text", ranks=3, chunks=16, learn=48, sweep=4)
    torch.set_grad_enabled(False)
    path = Path(args.model)
    from_gguf: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), **from_gguf)
    whole = Path(args.text).read_text(encoding="utf-8")
    text = tokens(tokenizer, whole, args.chunks)
    halves = [whole[len(whole) * n // 4 :] for n in (2, 3)]
    learnt = [tokens(tokenizer, half, args.learn) for half in halves]
    about = {
        "model": path.stem,
        "ranks": args.ranks,
        "tokens": text.numel(),
        "learnt": learnt[0].numel(),
    }
    measure(Ranks(model, args.ranks), text, learnt, args.sweep, Rows(args.output, about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
