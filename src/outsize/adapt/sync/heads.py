"""Head grouping (Sync-Point Drop, arXiv 2502.20727, section 5): which key heads, each with its queries, lie
together on a rank, and beside which neurons. With both sums it changes nothing; where the one after attention
is left out, a rank feeds its neurons with its own heads alone, and some are better company than others.

The paper scatters heads by the distance of their attention and matches groups to neurons by a norm; here an
order is judged by what it is for, the error of the feed-forwards' sum on some tokens, and bettered swap by
swap until no swap between two ranks helps.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import combinations

import torch

from outsize.adapt.sync.blocks import Block, Range, parts

TOKENS = 512  # that an order is judged by
SWAPS, ROUNDS = 64, 16  # tried before one is taken, and taken at most
ENOUGH = 0.98  # of the error, that a swap must leave at most: less is the sample's


class Grouping:
    """One block, and the ranks that it is cut for."""

    def __init__(
        self, block: Block, neurons: Sequence[Range], ends: Sequence[int], unit: int = 1
    ) -> None:
        """`ends`: where each rank's key heads end in an order; `unit`: heads that stay together, since they
        are stored together."""
        count = len(block.x_TD)
        spread = torch.linspace(0, count - 1, min(TOKENS, count), dtype=torch.float64, device="cpu")
        self._block, self._neurons = block.some(spread.long()), neurons
        self._ends, self._unit = ends, unit
        with torch.inference_mode():
            self._by_key = self._block.by_key()
            whole = torch.stack(self._by_key).sum(0)
            self._due = self._block.ffns([whole] * len(neurons), neurons)

    def error(self, order: Sequence[int]) -> float:
        """Mean square of what the feed-forwards give wrong."""
        with torch.inference_mode():
            held = parts(self._by_key, order, self._ends)
            found = self._block.ffns(held, self._neurons)
            return float((found - self._due).square().mean())

    def best(self) -> tuple[tuple[int, ...], float, float]:
        """The order that is found; its error, and that of the model's own order."""
        order = tuple(range(len(self._by_key)))
        first = least = self.error(order)
        for number in range(ROUNDS):
            found = {swapped: self.error(swapped) for swapped in self._swaps(order, number)}
            better = min(found, key=found.__getitem__, default=order)
            if not found or found[better] > ENOUGH * least:
                break
            order, least = better, found[better]
        return order, least, first

    def _swaps(self, order: tuple[int, ...], seed: int) -> Iterator[tuple[int, ...]]:
        """The order with two units of different ranks in each other's place; some of all, where these are
        many."""
        size = self._unit
        rank_of = [sum(at >= end for end in self._ends) for at in range(0, len(order), size)]
        pairs = [p for p in combinations(range(len(rank_of)), 2) if rank_of[p[0]] != rank_of[p[1]]]
        if len(pairs) > SWAPS:
            pairs = random.Random(seed).sample(pairs, SWAPS)
        for a, b in pairs:
            units = [order[at : at + size] for at in range(0, len(order), size)]
            units[a], units[b] = units[b], units[a]
            yield tuple(k for unit in units for k in unit)
