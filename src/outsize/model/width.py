"""How wide feed-forwards of nested experts are computed: a user's choice (`auto`, `full`, or a share of
them), one request's threshold, and what was executed of it.

A layer's router gives each width a probability, by what enters the feed-forward; a token uses the narrowest
width by which they sum to the threshold (arXiv 2502.12325; the rule and its numbers are ours). One router
serves all thresholds: higher ones use more. Without a router every token uses the same share. What a narrow
width leaves out may be made up for by a low-rank map of the same input.

Shapes: T tokens, D width of the stream, M widths of feed-forwards, R rank.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from outsize.errors import OptionError

AUTO, FULL = "auto", "full"
NOT_MEASURED = "lossy: not measured"


@dataclass(slots=True)
class Width:
    """One request's: a share of the feed-forwards, as asked for, the threshold that gives it on average, and
    the pieces that were used, of those that there were."""

    share: float
    threshold: float
    used: int = 0
    seen: int = 0
    tally: dict[tuple[int, int], int] | None = (
        None  # tokens, by layer and how many pieces they used
    )

    @property
    def executed(self) -> float:
        """Share of the feed-forwards that was computed."""
        return self.used / self.seen if self.seen else self.share


class Point(NamedTuple):
    """A threshold, and the share of the feed-forwards that it executes on average."""

    threshold: float
    share: float


class Correction(NamedTuple):
    """What is added for a width: b (a x) + c."""

    a_RD: Tensor
    b_DR: Tensor
    c_D: Tensor

    def __call__(self, x_TD: Tensor, wide: bool) -> Tensor:
        """(T, D) fp32."""
        x = x_TD.float()
        if wide:
            return x @ self.a_RD.T @ self.b_DR.T + self.c_D
        return torch.stack([self.b_DR @ (self.a_RD @ row) + self.c_D for row in x])


class LayerRouter(NamedTuple):
    """One layer's: `pieces` of each width, rising; the last are all. `corrections`: of all other widths, or
    none."""

    w_MD: Tensor
    b_M: Tensor
    pieces: tuple[int, ...]
    corrections: tuple[Correction, ...] = ()

    def __call__(self, x_TD: Tensor, threshold: float, wide: bool) -> list[int]:
        """Pieces that each row uses; in a narrow step each is chosen as if alone."""
        x = x_TD.float()
        if wide:
            return [self.pieces[i] for i in chosen(x @ self.w_MD.T + self.b_M, threshold).tolist()]
        rows = (torch.addmv(self.b_M, self.w_MD, row).tolist() for row in x)
        return [self.pieces[narrowest(z, threshold)] for z in rows]

    def correct(self, pieces: Sequence[int], x_TD: Tensor, y_TD: Tensor, wide: bool) -> None:
        """Add to rows of y what makes up for the pieces that they leave out."""
        for n, correction in zip(self.pieces, self.corrections, strict=False):
            rows = [t for t, used in enumerate(pieces) if used == n]
            if rows:
                y_TD[rows] += correction(x_TD[rows], wide)


def chosen(z_TM: Tensor, threshold: float | Tensor) -> Tensor:
    """(..., T) which width each token uses: the narrowest by which probabilities sum to the threshold."""
    sum_TM = torch.softmax(z_TM, dim=-1).cumsum(dim=-1)
    return (sum_TM[..., :-1] < threshold).sum(dim=-1)


def _not_measured(share: float) -> str:
    return NOT_MEASURED


def narrowest(z_M: Sequence[float], threshold: float) -> int:
    """`chosen` of one token: a few numbers, which cost less so than as a tensor."""
    most = max(z_M)
    odds = [math.exp(z - most) for z in z_M]
    left = threshold * sum(odds)
    for i, odd in enumerate(odds[:-1]):
        left -= odd
        if left <= 0:
            return i
    return len(odds) - 1


@dataclass(slots=True)
class Nested:
    """A model's nested experts: `count` pieces a layer, and, where an add-on has them, routers and what
    their thresholds execute, rising."""

    count: int
    routers: Sequence[LayerRouter] = ()
    points: Sequence[Point] = ()
    auto: float = 1.0  # what `auto` turned out to be
    is_shared: bool = False  # between ranks, which are told of no width
    cost: Callable[[float], str] = _not_measured  # of a share, in words

    def width(self, given: str | float) -> Width | None:
        """Of a request, by what its user says; None: all of the feed-forwards. Raises OptionError."""
        found = parse_width(given)
        share = self.auto if isinstance(found, str) else found
        if found != 1.0 and not self.count:
            raise OptionError(
                f"width is {given!r}, and this model is not cut into nested experts; `outsize adapt nested` "
                "does that, or leave it out"
            )
        if share < 1 and self.is_shared:
            raise OptionError(
                f"width is {given!r}, which several ranks do not run; leave it out, or --ranks"
            )
        return None if share >= 1 else Width(share, self._threshold(share))

    def _threshold(self, share: float) -> float:
        """Between the two points around a share."""
        first = Point(0.0, 0.0)
        for low, high in pairwise([first, *self.points]):
            if share <= high.share:
                part = (share - low.share) / max(1e-9, high.share - low.share)
                return low.threshold + part * (high.threshold - low.threshold)
        return self.points[-1].threshold if self.points else share

    def pieces(self, layer: int, x_TD: Tensor, width: Width, wide: bool) -> list[int]:
        """That each row uses of a layer; counted."""
        found = self.foreseen(layer, x_TD, width, wide)
        width.used += sum(found)
        width.seen += self.count * len(found)
        if width.tally is not None:
            for n, times in Counter(found).items():
                width.tally[layer, n] = width.tally.get((layer, n), 0) + times
        return found

    def foreseen(self, layer: int, x_TD: Tensor, width: Width, wide: bool = False) -> list[int]:
        """The same, not counted."""
        if self.routers:
            return self.routers[layer](x_TD, width.threshold, wide)
        return [max(1, math.ceil(width.share * self.count - 1e-6))] * len(x_TD)

    def correct(
        self, layer: int, pieces: Sequence[int], xy: tuple[Tensor, Tensor], wide: bool
    ) -> None:
        """Add to the second what makes up for pieces that rows leave out."""
        if self.routers and self.routers[layer].corrections:
            self.routers[layer].correct(pieces, *xy, wide)


def parse_width(given: str | float) -> str | float:
    """AUTO, or a share of the feed-forwards. Raises OptionError."""
    if given in (AUTO, FULL):
        return AUTO if given == AUTO else 1.0
    try:
        share = math.nan if isinstance(given, bool) else float(given)
    except (ValueError, TypeError):
        share = math.nan
    if not 0 < share <= 1:
        raise OptionError(
            f"width is {given!r}; auto, full or a share above 0 and up to 1 is expected, as 0.5"
        )
    return share
