"""What labels and routers go by: how the mean width of a token, over its layers, goes with its surprisal,
with how uncertain the next token is, and with its position (rank correlations); and each layer's mean width.

    python -m experiments.quality.nested_labels NESTED-PACK BASE TEXT... --share .5 -o FILE.jsonl"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from experiments.quality.nested_arms import Arms
from experiments.runs import arguments, record
from outsize.adapt.nested.prefixes import Prefixes
from outsize.adapt.sparsity.words import spread, words

LENGTH, AIMED, FIRST = (
    256,
    2,
    4,
)  # tokens of a sequence, sequences to find levels on, positions left out


def main() -> None:
    args = arguments(
        __doc__, "nested", "base", "texts+", tokens=2048, name="smol", share=0.5, file=""
    )
    arms = Arms(args.nested, args.base, args.file)
    for name in args.texts:
        found = words(arms.base, [Path(name)], 1 << 17, LENGTH)
        ids = spread(torch.cat([found.ids_BT, found.held_out_BT]), args.tokens // LENGTH)
        told = _told(arms, ids)
        for way, make, rises in (("labels", arms.oracle, False), ("router", arms.routed, True)):
            level = arms.at(spread(ids, AIMED), args.share, make, rises)
            seen = arms.run(ids, make(level))
            said = {"model": args.name, "text": Path(name).name, "way": way, "share": args.share}
            record({**said, **_row(arms, seen, told)}, args.output)


def _told(arms: Arms, ids: Tensor) -> dict[str, Tensor]:
    """(B, T - 1) of each token but the first: what the base model says of it, and of what follows."""
    logits = torch.stack([arms.model.logits(h).float().log_softmax(-1) for h in arms.former(ids)])
    surprisal = -logits[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    entropy = -(logits.exp() * logits).sum(-1)[:, 1:]
    position = torch.arange(1, ids.shape[1]).float().expand(len(ids), -1)
    return {"surprisal": surprisal, "entropy": entropy, "position": position}


def _row(arms: Arms, seen: Prefixes, told: dict[str, Tensor]) -> dict[str, object]:
    width_LBT = arms.widths_M[torch.stack(seen.chosen)]
    mean = width_LBT.mean(0)[:, 1:]
    rows = {
        name: round(_ranked(mean[:, FIRST:].flatten(), x[:, FIRST:].flatten()), 3)
        for name, x in told.items()
    }
    by_layer = [round(float(w), 3) for w in width_LBT.flatten(1).mean(1)]
    return {**rows, "tokens": mean[:, FIRST:].numel(), "least_layer": min(by_layer),
            "most_layer": max(by_layer), "by_layer": by_layer}  # fmt: skip


def _ranked(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation; equals are ranked by chance of their order."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


if __name__ == "__main__":
    main()
