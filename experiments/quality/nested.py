"""Which tokens get how much of their feed-forwards, at equal mean active parameters (nested_arms.py): KL from
the base model (its standard error over sequences), perplexity and agreement, on several held-out texts.

    python -m experiments.quality.nested NESTED-PACK BASE TEXT... --tokens 2048 --name smol -o FILE.jsonl"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from experiments.quality.nested_arms import Arms, Way, sizes, spread_over
from experiments.runs import arguments, record
from outsize.adapt.divergence import divergence, following
from outsize.adapt.nested.prefixes import Prefixes
from outsize.adapt.sparsity.words import spread, words

LENGTH = 256  # tokens of a sequence
LEARNED = 16  # that corrections are fitted to
AIMED = 1  # sequences that thresholds are found on


class Text:
    """Held-out sequences, and what the base model says of them."""

    def __init__(self, arms: Arms, ids: Tensor) -> None:
        self.arms, self.ids = arms, ids
        self._former = arms.former(ids)
        self._next = following(ids)

    def row(self, way: Way) -> tuple[dict[str, float], Prefixes]:
        arms, seen = self.arms, self.arms.run(self.ids, way)
        found = [
            divergence(arms.model, *rows)
            for rows in zip(self._former, seen.states, self._next, strict=True)
        ]
        each = [f.kl for f in found]
        (pieces, beside), share = sizes(arms.pack), arms.share(seen, way)
        nll = torch.tensor([f.perplexity for f in found]).log().mean().exp()
        whole = torch.tensor([f.former_perplexity for f in found]).log().mean().exp()
        return {
            "share": round(share, 4), "kl": round(sum(each) / len(each), 4),
            "kl_se": round(spread_over(each), 4),
            "top1": round(sum(f.top1 for f in found) / len(found), 4),
            "perplexity": round(float(nll), 3), "whole": round(float(whole), 3),
            "mb": round((beside + share * pieces) / 1e6, 2), "mb_whole": round((beside + pieces) / 1e6, 2),
        }, seen  # fmt: skip


def main() -> None:
    args = arguments(__doc__, "nested", "base", "texts+", tokens=2048, name="smol", seeds=3,
                     file="", rank=0, data="", refit=False, arms="router,oracle,layers,random,static,skip",
                     shares=[0.5, 0.75])  # fmt: skip
    arms, wanted = Arms(args.nested, args.base, args.file), args.arms.split(",")
    a = arms.file.about
    if args.data:
        learned = words(arms.base, [Path(p) for p in args.data.split(",")], 1 << 16).ids_BT
        if args.refit:
            arms.refit(learned)
        if args.rank:
            arms.correct(spread(learned, LEARNED), args.rank)
    for name in args.texts:
        found = words(arms.base, [Path(name)], 1 << 17, LENGTH)
        ids = spread(torch.cat([found.ids_BT, found.held_out_BT]), args.tokens // LENGTH)
        text, some = Text(arms, ids), spread(ids, AIMED)
        said = {"model": args.name, "text": Path(name).name, "rank": args.rank or a.rank, "seed": a.seed,
                "trained_tokens": a.trained_tokens, "tokens": ids.numel()}  # fmt: skip
        record({**said, "at": 1.0, "arm": "full", **text.row(arms.whole())[0]}, args.output)
        for share in args.shares:
            put = partial(_put, {**said, "at": share}, args.output)
            made, like = text.row(arms.routed(arms.at(some, share, arms.routed, True)))
            real = made["share"]
            put("router", made)
            for arm, make in (("oracle", arms.oracle), ("layers", arms.by_layer)):
                if arm in wanted:
                    put(arm, text.row(make(arms.at(some, real, make, False)))[0])
            for seed in range(args.seeds if "random" in wanted else 0):
                put("random", text.row(arms.shuffled(like, seed))[0] | {"draw": seed})
            for arm, plain in (("static", arms.static), ("skip", arms.skipped)):
                if arm in wanted:
                    put(arm, text.row(plain(real))[0])


def _put(said: dict[str, object], output: Path | None, arm: str, row: dict[str, float]) -> None:
    record({**said, "arm": arm, **row}, output)


if __name__ == "__main__":
    main()
