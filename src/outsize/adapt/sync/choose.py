"""Which sums to leave out or to send short: for each layer the ways there are, with what each was measured to
cost in loss and what it takes of time on a link; of all layers together those that take the least time at no
more than so much loss (a knapsack, by dynamic programming). Costs are taken to add up, which the caller
checks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from outsize.kernels.turned import row_bytes
from outsize.parallel.slow import Link

CELLS = 400  # of loss, that the budget is counted in
WHOLE = 16
DROPPED, CORRECTED, DISTILLED = "dropped", "corrected", "distilled"


@dataclass(frozen=True)
class Rises:
    """Of the loss, in nats: by each layer dropped alone, as it is, or with a correction in closed form, or
    with one that was distilled (empty: none were); and by all sums of a place sent in so many bits, in one
    layer (an equal part of what they cost together)."""

    dropped: Sequence[float]
    corrected: Sequence[float]
    bits: Mapping[tuple[str, int], float]  # by place and bits
    distilled: Sequence[float] = ()

    def best(self, layer: int) -> tuple[str, float]:
        """How a layer is best dropped, and what that costs."""
        found = {DROPPED: self.dropped[layer], CORRECTED: self.corrected[layer]}
        if self.distilled:
            found[DISTILLED] = self.distilled[layer]
        way = min(found, key=found.__getitem__)
        return way, found[way]


class Layer(NamedTuple):
    """What becomes of one layer's two sums: the first `dropped`, or the bits of each."""

    drop: str = ""  # or `dropped`, `corrected`, `distilled`
    attention: int = WHOLE
    ffn: int = WHOLE  # if the first is dropped: of the one that there is


@dataclass(frozen=True)
class Times:
    """Of a message of one token to each other rank."""

    link: Link
    software_s: float
    width: int
    world: int

    def seconds(self, layer: Layer) -> float:
        first = 0.0 if layer.drop else self.message_s(layer.attention)
        return first + self.message_s(layer.ffn)

    def message_s(self, bits: int) -> float:
        size = 2 * self.width if bits == WHOLE else row_bytes(self.width, bits)
        sent = size * (self.world - 1) / self.link.bytes_per_s
        return self.software_s + self.link.delay_s + sent


def ways(rises: Rises, layer: int) -> dict[Layer, float]:
    """All that a layer's sums can be, and what each costs; gains that measuring seems to show are none."""
    bits = sorted({b for _, b in rises.bits} | {WHOLE})

    def cost(place: str, b: int) -> float:
        return 0.0 if b == WHOLE else max(0.0, rises.bits[place, b])

    found = {Layer("", a, f): cost("attention", a) + cost("ffn", f) for a in bits for f in bits}
    each = rises.best(layer)
    for f in bits:
        found[Layer(each[0], WHOLE, f)] = max(0.0, each[1]) + cost("ffn", f)
    return found


def choose(rises: Rises, times: Times, most: float) -> list[Layer]:
    """Of each layer, so that together they cost at most `most` nats and take the least time."""
    layers = len(rises.dropped)
    best = [0.0] + [float("inf")] * CELLS  # seconds, by cells of loss that are used up
    taken: list[list[tuple[Layer, int]]] = []
    for layer in range(layers):
        options = [
            (way, cells, times.seconds(way))
            for way, cost in ways(rises, layer).items()
            if (cells := _cells(cost, most)) <= CELLS
        ]
        after, how = [float("inf")] * (CELLS + 1), [(Layer(), 0)] * (CELLS + 1)
        for used, seconds in enumerate(best):
            for way, cells, more in options if seconds < float("inf") else ():
                at = used + cells
                if at <= CELLS and seconds + more < after[at]:
                    after[at], how[at] = seconds + more, (way, cells)
        best = after
        taken.append(how)
    at, out = min(range(CELLS + 1), key=best.__getitem__), list[Layer]()
    for how in reversed(taken):
        way, cells = how[at]
        out.append(way)
        at -= cells
    return out[::-1]


def only(chosen: Sequence[Layer], layers: Collection[int]) -> list[Layer]:
    """A choice in some layers, and sums as they are in all others."""
    return [way if i in layers else Layer() for i, way in enumerate(chosen)]


def cost_of(rises: Rises, layer: int, way: Layer) -> float:
    """As measured, gains too: to order layers by."""
    places = ("ffn", way.ffn), ("attention", way.attention)
    bits = sum(rises.bits[place] for place in places if place[1] != WHOLE)
    return bits + (rises.best(layer)[1] if way.drop else 0.0)


def bits_of(chosen: Sequence[Layer]) -> dict[str, int]:
    """By layer and place, of those that are not whole."""
    found: dict[str, int] = {}
    for i, way in enumerate(chosen):
        if not way.drop:
            found[f"{i}.attention"] = way.attention
        found[f"{i}.{'block' if way.drop else 'ffn'}"] = way.ffn
    return {name: bits for name, bits in found.items() if bits != WHOLE}


def _cells(cost: float, most: float) -> int:
    """Rounded up: what is chosen never costs more than `most`."""
    if cost <= 0:
        return 0
    return CELLS + 1 if most <= 0 else min(CELLS + 1, int(-(-cost * CELLS // most)))
