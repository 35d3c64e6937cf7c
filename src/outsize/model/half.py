"""Half a layer: what every sub-layer is run as, and the usual one, a norm, a body, and the residual add.

Shapes: T rows, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from outsize.kernels.norm import RMSNorm
from outsize.model.joint import ALONE, PLAIN_ENDS, Ends, Whole, in_flight
from outsize.model.norms import Body, Entry, entering
from outsize.model.step import Step


class Runnable(Protocol):
    """Half a layer over weights in memory."""

    def run(self, chunks: Sequence[tuple[Tensor, Step]]) -> None:
        """Run all chunks of rows, in order. Changes their residual streams (T, D)."""
        ...


class SubLayer:
    """h += scale * post(body(norm(h)) + bias), in place; few families have the norm after the body, the bias
    or the scale, or no norm before."""

    def __init__(
        self,
        norm: Entry,
        body: Body,
        post: RMSNorm | None = None,
        bias_D: Tensor | None = None,
        how: Ends = PLAIN_ENDS,
    ) -> None:
        """`norm`: or the type that enters the body as it is; None: what attention read does."""
        self.norm, self.body, self._post, self.bias_D = norm, body, post, bias_D
        self.scale, self._joint = how

    def __call__(self, h_TD: Tensor, step: Step) -> None:
        self._end(h_TD, step, self._begin(h_TD, step))

    def run(self, chunks: Sequence[tuple[Tensor, Step]]) -> None:
        if self._joint is not ALONE:
            in_flight(chunks, self._begin, self._end)
        for chunk in chunks if self._joint is ALONE else ():
            self(*chunk)

    def entering(self, h_TD: Tensor, step: Step) -> Tensor:
        """(T, D): what enters the body."""
        return entering(h_TD, step, self.norm)

    def _begin(self, h_TD: Tensor, step: Step) -> Whole:
        return self._joint.outer(self.body(self.entering(h_TD, step), step))

    def _end(self, h_TD: Tensor, step: Step, whole: Whole) -> None:
        step.residual(h_TD, whole(), self._post, self.bias_D, self.scale)
