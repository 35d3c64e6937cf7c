"""Nested experts of a model of which nothing is trained: its neurons in order of importance, and who gets how
much by labels (an oracle), by layer, the same for all, or with layers left out; at equal mean active
parameters (nested_arms.py).

    python -m experiments.quality.nested_zero_shot MODEL TEXT... --data TRAIN --name qwen -o FILE.jsonl"""

from __future__ import annotations

from pathlib import Path

import torch

from experiments.quality.nested_arms import Plain, Way, spread_over
from experiments.runs import arguments, record
from outsize.adapt.divergence import divergence, following
from outsize.adapt.nested.order import by_importance
from outsize.adapt.nested.prefixes import in_order
from outsize.adapt.sparsity.words import spread, words
from outsize.adapt.statistics import bf16_products, causal
from outsize.adapt.trainable import TrainableModel, matmul_type
from outsize.pack import fetch
from outsize.progress import silent

LENGTH, WIDTHS = 256, (1, 2, 3, 4)


def main() -> None:
    args = arguments(__doc__, "model", "texts+", data=[""], tokens=512, learned=4096, name="qwen",
                     shares=[0.75, 0.5])  # fmt: skip
    base = fetch.find(args.model) or fetch.pack(args.model)
    kind = matmul_type(torch.device("cpu"))
    model = TrainableModel(base, torch.device("cpu"), kind, silent)
    known = words(base, [Path(p) for p in args.data], 2 * args.learned, LENGTH).ids_BT
    order = by_importance(model, spread(known, args.learned // LENGTH), "norm")
    size = base.description.ffn_width // WIDTHS[-1]
    made = Plain(model, in_order(model, order), [n * size for n in WIDTHS], WIDTHS)
    for name in args.texts:
        found = words(base, [Path(name)], 1 << 16, LENGTH)
        ids = spread(torch.cat([found.ids_BT, found.held_out_BT]), args.tokens // LENGTH)
        with torch.no_grad(), bf16_products():
            former = model.run(causal(model.embed(ids)))[0]
        for share in args.shares:
            level = made.at(ids[:1], share, made.oracle, False)
            ways = {"oracle": made.oracle(level), "static": made.static(share), "skip": made.skipped(share),
                    "layers": made.by_layer(made.at(ids[:1], share, made.by_layer, False))}  # fmt: skip
            for arm, way in ways.items():
                said = {"model": args.name, "text": Path(name).name, "at": share, "arm": arm}
                record({**said, "tokens": ids.numel(), **_row(made, way, former, ids)}, args.output)


def _row(made: Plain, way: Way, former: torch.Tensor, ids: torch.Tensor) -> dict[str, float]:
    seen = made.run(ids, way)
    rows = zip(former, seen.states, following(ids), strict=True)
    found = [divergence(made.model, *row) for row in rows]
    each = [f.kl for f in found]
    nll = torch.tensor([[f.perplexity, f.former_perplexity] for f in found]).log().mean(0).exp()
    return {
        "share": round(made.share(seen, way), 4), "kl": round(sum(each) / len(each), 4),
        "kl_se": round(spread_over(each), 4), "top1": round(sum(f.top1 for f in found) / len(found), 4),
        "perplexity": round(float(nll[0]), 3), "whole": round(float(nll[1]), 3),
    }  # fmt: skip


if __name__ == "__main__":
    main()
