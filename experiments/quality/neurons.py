"""How coarsely a SwiGLU model's neurons may be left out: perplexity where the best bundles of each token
are known (an oracle), by the size of a bundle and the order of the neurons.

    python -m experiments.quality.neurons MODEL TEXT TOKENS NAME -o
    experiments/results/epyc-2core/neurons-bundles.jsonl"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from experiments.runs import arguments, record
from outsize.adapt.change import AS_IS, Change
from outsize.adapt.sparsity.measure import by_use
from outsize.adapt.sparsity.words import words
from outsize.adapt.statistics import bf16_products, causal
from outsize.adapt.trainable import TrainableModel, matmul_type
from outsize.pack import fetch
from outsize.progress import silent

CPU = torch.device("cpu")
WAYS = (
    (1, "natural"),
    (4, "use"),
    (8, "natural"),
    (8, "use"),
    (16, "use"),
    (32, "natural"),
    (32, "use"),
)
SHARES = (0.5, 0.7, 0.85)


class LeaveOut(Change):
    """Zeros for the neurons of bundles of little energy: all but such a share, in each layer."""

    def __init__(self, share: float, bundle: int, order_LF: Tensor | None) -> None:
        self._share, self._bundle, self._order = share, bundle, order_LF

    def weight(self, w: Tensor, x: Tensor, layer: int, name: str) -> Tensor:
        if name == "down":
            rows, norm = x.flatten(0, 1), w.float().norm(dim=0)
            order = torch.arange(len(norm)) if self._order is None else self._order[layer]
            energy = (
                (rows.float() * norm).square()[:, order].unflatten(1, (-1, self._bundle)).sum(2)
            )
            some = energy.flatten()[:: max(1, energy.numel() // 1_000_000)]
            kept = (energy >= torch.quantile(some, 1 - self._share)).repeat_interleave(
                self._bundle, 1
            )
            back = torch.empty_like(order)
            back[order] = torch.arange(len(order))
            x.mul_(kept[:, back].view_as(x))  # what down is given, in place
        return w


@torch.no_grad()
def perplexity(model: TrainableModel, ids_BT: Tensor, change: Change) -> float:
    with bf16_products():
        layers = range(model.description.num_layers)
        h = model.through(causal(model.embed(ids_BT)), layers, change)
        logits = model.logits(model.normed(h)).float()
    return math.exp(cross_entropy(logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()))


def main() -> None:
    a: Any = arguments(__doc__, "model", "text", "tokens", "name")
    pack = fetch.pack(a.model, quiet=True)
    found = words(pack, [Path(a.text)], int(a.tokens))
    model = TrainableModel(pack, CPU, matmul_type(CPU), silent)
    order, held_out = by_use(model, found.ids_BT[:4]), found.held_out_BT[:2]
    dense = perplexity(model, held_out, AS_IS)
    for share in SHARES:
        for bundle, how in WAYS:
            change = LeaveOut(share, bundle, order if how == "use" else None)
            made = perplexity(model, held_out, change)
            row = {"model": a.name, "share": share, "bundle": bundle, "order": how}
            told = {"dense": round(dense, 2), "perplexity": round(made, 2)}
            record(row | told, a.output)


if __name__ == "__main__":
    main()
