"""Which tokens get how much of their feed-forwards, at equal mean active parameters: by routers, by labels
(an oracle), by chance with the routers' shares in each layer, the same for all tokens, and with whole
feed-forwards skipped. KL from the whole model, perplexity and agreement, on several held-out texts.

    python -m experiments.quality.nested NESTED-PACK BASE TEXT... --tokens 2048 --name smol -o FILE.jsonl"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from experiments.runs import arguments
from outsize.adapt.divergence import divergence
from outsize.adapt.nested.prefixes import Choose, Prefixes, ffns, labels
from outsize.adapt.sparsity.words import words
from outsize.adapt.statistics import bf16_products, causal
from outsize.adapt.trainable import TrainableModel, matmul_type
from outsize.model.width import chosen
from outsize.pack import fetch, nested_file
from outsize.pack.nested_file import BIAS, ROUTER, A, B, C, NestedFile
from outsize.progress import silent

CPU = torch.device("cpu")
SHARES = (0.5, 0.75)
SEEDS = 3
ENDS = 2  # first and last layers that are not skipped
GOLDEN = 0.6180339887498949


class Skipping(Prefixes):
    """As `Prefixes`, and width -1 is nothing at all."""

    def ffn(self, x: Tensor, h: Tensor, layer: int, whole: Callable[[], Tensor]) -> Tensor:
        out = super().ffn(x, h, layer, whole)
        return out * 0 if layer in self.skipped else out

    skipped: frozenset[int] = frozenset()


class Arms:
    """One text, all ways of choosing."""

    def __init__(self, model: TrainableModel, file: NestedFile, parts: tuple[object, ...]) -> None:
        self.model, (self._ffns, self._ends) = model, parts  # type: ignore[assignment]
        self._router, self._bias = file.numbers(ROUTER), file.numbers(BIAS)
        self._fixes = {n: file.numbers(n) for n in (A, B, C)} if file.about.rank else None
        self._widths = torch.tensor(file.about.widths).float() / file.about.count

    def begin(self, ids: Tensor) -> None:
        self.ids, self._next = ids, torch.cat([ids[:, 1:], ids[:, :1] * 0 - 1], 1).flatten()
        self._whole = self._run(self._constant(len(self._widths) - 1), ())
        self.layers = len(self._whole.chosen)
        self._former = self._whole.states.flatten(0, 1)

    @torch.no_grad()
    def _run(self, choose: Choose, skipped: tuple[int, ...]) -> Prefixes:
        seen = Skipping(self.model, self._ffns, self._ends, choose, self._fixes)  # type: ignore[arg-type]
        seen.skipped = frozenset(skipped)
        with bf16_products():
            seen.states, _ = self.model.run(causal(self.model.embed(self.ids)), change=seen)
        return seen

    def row(
        self, choose: Choose, skipped: tuple[int, ...] = ()
    ) -> tuple[dict[str, float], Prefixes]:
        seen = self._run(choose, skipped)
        found = divergence(self.model, self._former, seen.states.flatten(0, 1), self._next)
        used = [
            0.0 if i in skipped else float(self._widths[w].mean())
            for i, w in enumerate(seen.chosen)
        ]
        made = {
            "share": round(sum(used) / len(used), 4), "kl": round(found.kl, 4),
            "top1": round(found.top1, 4), "perplexity": round(found.perplexity, 3),
            "whole": round(found.former_perplexity, 3),
        }  # fmt: skip
        return made, seen

    def _constant(self, width: int) -> Choose:
        return lambda layer, x, error: torch.full(x.shape[:-1], width)

    def routed(self, threshold: float) -> Choose:
        def choose(layer: int, x: Tensor, error: Tensor) -> Tensor:
            z = x.float() @ self._router[layer].T + self._bias[layer]
            return chosen(z.flatten(0, 1), threshold).view(x.shape[:-1])

        return choose

    def oracle(self, level: float) -> Choose:
        return lambda layer, x, error: labels(error, level)

    def shuffled(self, like: Prefixes, seed: int) -> Choose:
        """Each layer's widths as they were, of other tokens."""
        generator = torch.Generator().manual_seed(seed)

        def choose(layer: int, x: Tensor, error: Tensor) -> Tensor:
            flat = like.chosen[layer].flatten()
            return flat[torch.randperm(len(flat), generator=generator)].view(x.shape[:-1])

        return choose

    def static(self, share: float) -> Choose:
        """One width for all tokens of a layer: of two neighbours, the wider in as many layers as it takes."""
        below = int((self._widths <= share + 1e-6).sum()) - 1
        above = min(below + 1, len(self._widths) - 1)
        step = float(self._widths[above] - self._widths[below])
        part = (share - float(self._widths[below])) / step if step else 0.0
        order = sorted(range(self.layers), key=lambda i: i * GOLDEN % 1)
        wide = set(order[: round(part * self.layers)])
        return lambda layer, x, error: torch.full(x.shape[:-1], above if layer in wide else below)

    def skipped(self, share: float) -> tuple[int, ...]:
        """Layers whose feed-forwards are left out, spread over the middle."""
        inner = range(ENDS, self.layers - ENDS)
        order = sorted(inner, key=lambda i: i * GOLDEN % 1)
        return tuple(order[: round((1 - share) * self.layers)])

    def at(self, share: float, make: Callable[[float], Choose], rises: bool) -> float:
        """The threshold or level at which a way executes a share of this very text."""
        low, high = 0.0, 1.0
        for _ in range(7):
            middle = (low + high) / 2
            seen = self._run(make(middle), ())
            now = sum(float(self._widths[w].mean()) for w in seen.chosen) / self.layers
            low, high = (middle, high) if (now < share) == rises else (low, middle)
        return (low + high) / 2


def main() -> None:
    args = arguments(__doc__, "nested", "base", "texts+", tokens=2048, name="smol", seed=0)
    pack, base = (fetch.find(name) or fetch.pack(name) for name in (args.nested, args.base))
    file = nested_file.of_pack(pack)
    assert file is not None
    kind = matmul_type(CPU)
    model = TrainableModel(base, CPU, kind, silent)
    size = base.description.ffn_width // file.about.count
    arms = Arms(model, file, (ffns(pack, kind), [n * size for n in file.about.widths]))
    for text in args.texts:
        found = words(base, [Path(text)], 1 << 17)
        length = found.held_out_BT.shape[1]
        arms.begin(found.held_out_BT[-max(1, args.tokens // length) :])
        said = {"model": args.name, "text": Path(text).name, "rank": file.about.rank,
                "steps": file.about.trained_tokens, "seed": file.about.seed}  # fmt: skip
        put = partial(_put, args.output, said)
        for share in SHARES:
            made, like = arms.row(arms.routed(arms.at(share, arms.routed, True)))
            put(share, "router", made)
            real = made["share"]
            put(share, "oracle", arms.row(arms.oracle(arms.at(real, arms.oracle, False)))[0])
            for seed in range(SEEDS):
                put(share, "random", arms.row(arms.shuffled(like, seed))[0] | {"draw": seed})
            put(share, "static", arms.row(arms.static(real))[0])
            whole = arms.static(1.0)
            put(share, "skip", arms.row(whole, arms.skipped(real))[0])


def _put(output: Path | None, said: dict[str, object], at: float, arm: str, row: object) -> None:
    assert isinstance(row, dict)
    line = json.dumps({**said, "at": at, "arm": arm, **row})
    print(line, file=sys.stdout, flush=True)
    if output is not None:
        with output.open("a") as out:
            out.write(line + "\n")


if __name__ == "__main__":
    main()
