"""The halves of a layer of one of several ranks, where the sum after attention may be left out (Sync-Point
Drop, arXiv 2502.20727; parallel/dropped.py has the mathematics): then attention's part is kept for the
feed-forward, which is fed with this rank's guess of the state, and whose message holds both.

Shapes: T rows, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from outsize.model.half import SubLayer
from outsize.model.joint import Whole, in_flight
from outsize.model.step import Held, Step
from outsize.parallel.collective import Collective, Point
from outsize.parallel.dropped import message


class SummedAttention:
    """Attention of some heads."""

    def __init__(self, half: SubLayer, layer: int, ranks: Collective) -> None:
        """`half`: as it is where the sum is taken."""
        self.half, self._layer, self._ranks = half, layer, ranks

    def run(self, chunks: Sequence[tuple[Tensor, Step]]) -> None:
        if self._layer not in self._ranks.drop:
            self.half.run(chunks)
            return
        for h_TD, step in chunks:
            normed_TD = self.half.entering(h_TD, step)
            step.held[:] = [Held(normed_TD, self.half.body(normed_TD, step), self.half.bias_D)]


class SummedFfn:
    """A feed-forward of some neurons, after such an attention."""

    def __init__(self, half: SubLayer, layer: int, ranks: Collective) -> None:
        """`half`: as it is where both sums are taken."""
        self.half, self._layer, self._ranks = half, layer, ranks

    def run(self, chunks: Sequence[tuple[Tensor, Step]]) -> None:
        if self._layer not in self._ranks.drop:
            self.half.run(chunks)
            return
        biases = [_sum(step.held[0].bias_D, self.half.bias_D) for _, step in chunks[:1]]
        in_flight(chunks, self._begin, partial(self._end, biases[0] if biases else None))

    def _begin(self, h_TD: Tensor, step: Step) -> Whole:
        held = step.held.pop()
        guess_TD = self._ranks.drop.attention(
            self._layer, held.part_TD, held.normed_TD, not step.wide
        )
        if held.bias_D is not None:
            guess_TD = guess_TD + held.bias_D
        h_TD = h_TD + guess_TD * self.half.scale
        ffn_TD = self.half.body(self.half.entering(h_TD, step), step)
        return self._ranks.sum(message(held.part_TD, ffn_TD), Point(self._layer, "block")).wait

    def _end(self, bias_D: Tensor | None, h_TD: Tensor, step: Step, whole: Whole) -> None:
        step.residual(h_TD, whole(), None, bias_D, self.half.scale)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
