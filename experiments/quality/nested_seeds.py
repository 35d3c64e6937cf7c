"""Short ablations of routers, each with several seeds: trained anew for a nested pack, labels by agreement or
by the loss, and compared with chance at equal mean active parameters (nested_arms.py).

    python -m experiments.quality.nested_seeds NESTED-PACK BASE TEXT... --data TRAIN... -o FILE.jsonl"""

from __future__ import annotations

from pathlib import Path

import torch

from experiments.quality.nested import AIMED, LENGTH, Text
from experiments.quality.nested_arms import Arms
from experiments.runs import arguments, record
from outsize.adapt import loop
from outsize.adapt.nested.task import NestedRecipe, NestedTask, Widths
from outsize.adapt.sparsity.words import Words, spread, words


def main() -> None:
    args = arguments(__doc__, "nested", "base", "texts+", data=[""], tokens=1024, name="smol", seeds=3,
                     steps=24, share=0.5, labels="agreement", file="")  # fmt: skip
    arms = Arms(args.nested, args.base, args.file)
    learned = words(arms.base, [Path(p) for p in args.data], 1 << 16)
    found = {name: words(arms.base, [Path(name)], 1 << 17, LENGTH) for name in args.texts}
    for kind in args.labels.split(","):
        for seed in range(args.seeds):
            recipe = NestedRecipe(steps=args.steps, batch=1, seed=seed, labels=kind)
            _train(arms, recipe, learned)
            for name, some in found.items():
                ids = spread(torch.cat([some.ids_BT, some.held_out_BT]), args.tokens // LENGTH)
                text, aimed = Text(arms, ids), spread(ids, AIMED)
                made, like = text.row(arms.routed(arms.at(aimed, args.share, arms.routed, True)))
                chance, _ = text.row(arms.shuffled(like, seed))
                said = {"model": args.name, "text": Path(name).name, "labels": kind, "seed": seed,
                        "steps": args.steps, "at": args.share}  # fmt: skip
                record({**said, "arm": "router", **made}, args.output)
                record({**said, "arm": "random", **chance}, args.output)


def _train(arms: Arms, recipe: NestedRecipe, learned: Words) -> None:
    about = arms.file.about
    widths = Widths(about.widths, arms.base.description.ffn_width // about.count)
    task = NestedTask(recipe, arms.model, arms.ffns, widths, (learned.ids_BT, learned.held_out_BT))
    training = loop.start(task, "")
    for _ in range(recipe.steps):
        training.run_step()
    arms.put(*task.routers)


if __name__ == "__main__":
    main()
