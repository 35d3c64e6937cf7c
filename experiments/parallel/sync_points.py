"""What sums between ranks may lose: perplexity with low bits, and with sums left out, of a real model.

    python -m experiments.parallel.sync_points MODEL.gguf TEXT.txt --ranks 3 [-o FILE]

One process computes every rank's parts of every layer (transformers, fp32), and adds them up as the
collectives of outsize/parallel would: Turned, Static, Drop with and without its correction. A row for each
way: perplexity on the text's beginning, its change against exact sums in per cent with an interval of two
standard errors (over chunks, paired), and how often the most likely token is the same. Steps, kept features,
corrections and the order of layers are from the text's second half alone.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.runs import arguments
from outsize.kernels.find import find
from outsize.kernels.turned import turner
from outsize.parallel.collective import Point
from outsize.parallel.dropped import Correction, Drop, Fit, message
from outsize.parallel.exact import sum_in_order
from outsize.parallel.lowbit import Codec, Turned
from outsize.parallel.static import Ranges, Static, Table

CHUNK, RANK = 256, 64
Sums = Callable[[list[Tensor], Point], Tensor]
Seen = Callable[[int, str, list[Tensor], Tensor], None]


def exact(parts: list[Tensor], at: Point) -> Tensor:
    return sum_in_order([p.bfloat16() for p in parts])


@dataclass
class Way:
    """How sums are taken. `drops`: by rank; `again`: is a part that was not summed added later (the paper),
    or never (a wrong version found in public code)? `seen`: is shown parts."""

    name: str
    sums: Sums = exact
    drops: Sequence[Drop] = ()
    again: bool = True
    seen: Seen | None = None
    more: dict[str, Any] = field(default_factory=dict)


class Ranks:
    """A model of transformers', cut as tensor parallelism cuts it."""

    def __init__(self, model: Any, world: int) -> None:
        self.model = model
        self.world, c = world, self.model.config
        kv, group = c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads
        size = self.model.model.layers[0].self_attn.o_proj.weight.shape[1] // c.num_attention_heads
        self.heads = [slice(a * group * size, b * group * size) for a, b in _cut(kv, world)]
        self.neurons = [slice(a, b) for a, b in _cut(c.intermediate_size, world)]
        self.outputs = [layer.self_attn.o_proj.weight.data for layer in self.model.model.layers]
        for layer in self.model.model.layers:
            assert layer.self_attn.o_proj.bias is None
            layer.self_attn.o_proj = nn.Identity()

    def logits(self, ids_T: Tensor, way: Way) -> Tensor:
        inner = self.model.model
        x, at = inner.embed_tokens(ids_T[None]), torch.arange(len(ids_T))[None]
        angles = inner.rotary_emb(x, at)
        mask = torch.full((len(ids_T), len(ids_T)), float("-inf")).triu(1)[None, None]
        for index in range(len(inner.layers)):
            x = self.layer(index, x, way, (angles, mask, at))
        return self.model.lm_head(inner.norm(x))[0]

    def layer(self, index: int, x: Tensor, way: Way, where: tuple[Any, Tensor, Tensor]) -> Tensor:
        layer, weight = self.model.model.layers[index], self.outputs[index]
        normed = layer.input_layernorm(x)
        angles, mask, at = where
        out = layer.self_attn(
            hidden_states=normed, position_embeddings=angles, attention_mask=mask, position_ids=at
        )[0][0]
        parts = [out[:, h] @ weight[:, h].T for h in self.heads]
        if way.seen is not None:
            way.seen(index, "attention", parts, normed[0])
        if way.drops and index in way.drops[0]:
            return self.dropped(index, x[0], parts, way, normed[0])[None]
        h = x[0] + way.sums(parts, Point(index, "attention"))
        ffn = [self.ffn(index, h, r) for r in range(self.world)]
        if way.seen is not None:
            way.seen(index, "ffn", ffn, h)
        return (h + way.sums(ffn, Point(index, "ffn")))[None]

    def dropped(
        self, index: int, x: Tensor, parts: list[Tensor], way: Way, normed: Tensor
    ) -> Tensor:
        out = []
        for r, part in enumerate(parts):
            ffn = self.ffn(index, way.drops[r].guess(index, x, part, normed), r)
            out.append(message(part, ffn) if way.again else ffn)
        summed = way.sums(out, Point(index, "block"))
        return x + summed + (0 if way.again else sum(parts) / self.world)

    def ffn(self, index: int, h: Tensor, rank: int) -> Tensor:
        layer, some = self.model.model.layers[index], self.neurons[rank]
        x, m = layer.post_attention_layernorm(h), layer.mlp
        inner = m.act_fn(x @ m.gate_proj.weight[some].T) * (x @ m.up_proj.weight[some].T)
        return inner @ m.down_proj.weight[:, some].T


def tokens(tokenizer: Any, text: str, chunks: int) -> Tensor:
    """(chunks, CHUNK) ids from the text's beginning."""
    ids = tokenizer(text[: chunks * CHUNK * 8])["input_ids"]
    return torch.tensor(ids[: chunks * CHUNK]).view(chunks, CHUNK)


def _cut(count: int, world: int) -> list[tuple[int, int]]:
    ends = [round(count * r / world) for r in range(world + 1)]
    return list(pairwise(ends))


def losses(ranks: Ranks, chunks: Tensor, way: Way) -> tuple[list[float], Tensor]:
    """Mean loss of each chunk, and the most likely token at each place."""
    found, likely = [], []
    for ids in chunks:
        logits = ranks.logits(ids, way)
        found.append(float(nn.functional.cross_entropy(logits[:-1], ids[1:])))
        likely.append(logits.argmax(1))
    return found, torch.stack(likely)


def coded(codecs: Sequence[Codec], places: Sequence[str] = ("attention", "ffn", "block")) -> Sums:
    def sums(parts: list[Tensor], at: Point) -> Tensor:
        if at.place not in places:
            return exact(parts, at)
        packed = [codec.pack(p, at) for codec, p in zip(codecs, parts, strict=True)]
        return codecs[0].sum(packed, parts[0].shape[1], at)

    return sums


class Calibration:
    """What is learnt beforehand: ranges of every point, corrections of every layer."""

    def __init__(self, ranks: Ranks, chunks: Tensor) -> None:
        self.ranks, self.width = ranks, ranks.outputs[0].shape[0]
        num = len(ranks.outputs)
        self.ranges = {
            Point(i, place): Ranges(ranks.world, self.width)  # type: ignore[arg-type]
            for i in range(num)
            for place in ("attention", "ffn")
        }
        self.fits = [[Fit(self.width) for _ in range(ranks.world)] for _ in range(num)]
        losses(ranks, chunks, Way("calibration", seen=self.see))

    def see(self, layer: int, place: str, parts: list[Tensor], normed: Tensor) -> None:
        total = sum_in_order(parts)
        for r, part in enumerate(parts):
            self.ranges[Point(layer, place)].see(r, part)  # type: ignore[arg-type]
            if place == "attention":
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
        return {"texts": sum(texts) / len(texts), "ranks": sum(between) / len(between)}


def zero_shot(layers: Sequence[int], world: int) -> list[Drop]:
    return [Drop(frozenset(layers))] * world


def ways(ranks: Ranks, known: Calibration, order: Sequence[int]) -> list[Way]:
    num, world, made = len(ranks.outputs), ranks.world, find()
    all_, late = range(num), range(4, num)
    found = [Way(f"turned, {b} bits", coded([Turned(turner(b, made))] * world)) for b in (4, 5, 6)]
    found += [
        Way(f"static, 16 bits for {c}", known.static(c)) for c in ("selected", "random", "none")
    ]
    found.append(
        Way("attention whole, turned 4 bits", coded([Turned(turner(4, made))] * world, ["ffn"]))
    )
    for name, layers in (("all", all_), ("all but the first four", late)):
        found.append(Way(f"dropped: {name}, zero-shot", drops=zero_shot(layers, world)))
        found.append(Way(f"dropped: {name}, closed form", drops=known.corrected(layers)))
    found.append(
        Way(
            "dropped: all but the first four, never added",
            drops=zero_shot(late, world),
            again=False,
        )
    )
    for share in (4, 2):
        best = order[: num // share]
        found.append(Way(f"dropped: best 1 in {share}, zero-shot", drops=zero_shot(best, world)))
    return found


def sensitivity(ranks: Ranks, chunks: Tensor) -> list[float]:
    """The rise in loss by each layer dropped alone, zero-shot."""
    base, _ = losses(ranks, chunks, Way("exact"))
    rises = []
    for layer in range(len(ranks.outputs)):
        found, _ = losses(ranks, chunks, Way("", drops=zero_shot([layer], ranks.world)))
        rises.append(sum(found) / len(found) - sum(base) / len(base))
    return rises


def compared(
    way: Way, base: tuple[list[float], Tensor], now: tuple[list[float], Tensor]
) -> dict[str, Any]:
    rise = [b - a for a, b in zip(base[0], now[0], strict=True)]
    mean, num = sum(rise) / len(rise), len(rise)
    error = math.sqrt(sum((r - mean) ** 2 for r in rise) / max(num - 1, 1) / num)
    change = [round(100 * math.expm1(mean + s * error), 2) for s in (0, -2, 2)]
    return {
        "way": way.name, "perplexity": round(math.exp(sum(now[0]) / num), 3), "change": change[0],
        "change_low": change[1], "change_high": change[2], "log_change": round(mean, 5),
        "top1_same": round(float((base[1] == now[1]).float().mean()), 4),
    }  # fmt: skip


def measure(
    ranks: Ranks,
    text: Tensor,
    learnt: list[Tensor],
    sweep: int,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Every way, a row each; `learnt`: two calibration texts, of which the first is used."""
    known, again = Calibration(ranks, learnt[0]), Calibration(ranks, learnt[1])
    keep({"way": "features", "calibration_tokens": learnt[0].numel(), **known.same(again)})
    rises = sensitivity(ranks, learnt[0][:sweep])
    order = sorted(range(len(rises)), key=rises.__getitem__)
    keep({"way": "sweep", "rises": [round(r, 5) for r in rises], "order": order})
    base = losses(ranks, text, Way("exact"))
    keep(compared(Way("exact"), base, base))
    for way in ways(ranks, known, order):
        keep(compared(way, base, losses(ranks, text, way)))


def main() -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    args = arguments(__doc__, "model", "text", ranks=3, chunks=8, learn=24, sweep=2)
    torch.set_grad_enabled(False)
    start, path = time.monotonic(), Path(args.model)
    from_gguf: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), **from_gguf)
    whole = Path(args.text).read_text(encoding="utf-8")
    text = tokens(tokenizer, whole, args.chunks)
    halves = [whole[len(whole) * n // 4 :] for n in (2, 3)]
    learnt = [tokens(tokenizer, half, args.learn) for half in halves]
    about = {"model": path.stem, "ranks": args.ranks, "tokens": text.numel()}

    def keep(row: dict[str, Any]) -> None:
        line = json.dumps({**about, **row, "seconds": round(time.monotonic() - start)})
        print(line, flush=True)
        if args.output is not None:
            with args.output.open("a") as out:
                out.write(line + "\n")

    measure(Ranks(model, args.ranks), text, learnt, args.sweep, keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
