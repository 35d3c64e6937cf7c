"""How many bits each matrix gets under a budget: the least loss in all, by Lagrange's rule; losses add up.

Layers whose records have the same shapes share a table and a ring of slots: there are few shapes of a kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import torch
from torch import Tensor

KINDS = (("qkv", "o"), ("gate_up", "down"))  # tensors of one record
SHAPES = 3  # of the records of a kind, at most
ROUNDS = 60  # of bisection
Stack = tuple[int, str]  # layer, tensor


@dataclass(frozen=True, slots=True)
class Option:
    """One size that a matrix may have."""

    bits: int  # of a code
    size: int  # bytes, everything counted
    loss: float


@dataclass(slots=True)
class _Kind:
    """Every layer's records of a kind, in every shape: `size`, `loss` (layers, shapes)."""

    names: tuple[str, ...]
    shapes: list[tuple[int, ...]]  # of each tensor, which option
    sets: Tensor  # (sets, SHAPES) of shapes that there may be
    size: Tensor
    loss: Tensor

    def best(self, price: float) -> Tensor:
        """(layers,): which shape each layer has, where a byte costs so much; few different ones."""
        cost = self.loss + price * self.size
        total = cost[:, self.sets].amin(dim=2).sum(dim=0)
        chosen = self.sets[int(total.argmin())]
        return chosen[cost[:, chosen].argmin(dim=1)]


def choose(options: Mapping[Stack, Sequence[Option]], budget: int) -> dict[Stack, int]:
    """Bits of each stack's codes, for at most `budget` bytes, which the smallest options keep."""
    kinds = [_kind(names, options) for names in KINDS]
    low, high = 0.0, 1.0
    while _size(kinds, found := [k.best(high) for k in kinds]) > budget and high < 1e30:
        high *= 4
    for _ in range(ROUNDS):
        price = (low + high) / 2
        tried = [k.best(price) for k in kinds]
        if _size(kinds, tried) <= budget:
            high, found = price, tried
        else:
            low = price
    _fill(kinds, found, budget)
    return {
        (layer, name): options[layer, name][kind.shapes[shape][i]].bits
        for kind, shapes in zip(kinds, found, strict=True)
        for layer, shape in enumerate(shapes.tolist())
        for i, name in enumerate(kind.names)
    }


def _kind(names: tuple[str, ...], options: Mapping[Stack, Sequence[Option]]) -> _Kind:
    layers = 1 + max(layer for layer, _ in options)
    shapes = list(product(*(range(len(options[0, name])) for name in names)))

    def table(field: str) -> Tensor:
        rows = [
            [
                sum(getattr(options[layer, n][i], field) for n, i in zip(names, s, strict=True))
                for s in shapes
            ]
            for layer in range(layers)
        ]
        return torch.tensor(rows, dtype=torch.float64)

    sets = combinations(range(len(shapes)), min(SHAPES, len(shapes)))
    return _Kind(names, shapes, torch.tensor(list(sets)), table("size"), table("loss"))


def _size(kinds: Sequence[_Kind], chosen: Sequence[Tensor]) -> float:
    return sum(
        float(k.size.gather(1, c[:, None]).sum()) for k, c in zip(kinds, chosen, strict=True)
    )


def _fill(kinds: Sequence[_Kind], chosen: Sequence[Tensor], budget: int) -> None:
    """Spend what is left on the layers that gain most a byte, in shapes that there are."""
    while True:
        left, best = budget - _size(kinds, chosen), (0.0, -1, -1, -1)
        for number, (kind, shapes) in enumerate(zip(kinds, chosen, strict=True)):
            for layer, shape in enumerate(shapes.tolist()):
                for other in shapes.unique().tolist():
                    more = float(kind.size[layer, other] - kind.size[layer, shape])
                    gain = float(kind.loss[layer, shape] - kind.loss[layer, other])
                    if 0 < more <= left and gain / more > best[0]:
                        best = gain / more, number, layer, other
        if best[1] < 0:
            return
        chosen[best[1]][best[2]] = best[3]
