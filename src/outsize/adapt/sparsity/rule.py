"""The rule that chooses a layer's bundles by their scores, set so that a given share of them is chosen on
average: a threshold, or, for chunks, a threshold and the price of a read that go together.

Shapes: T tokens that were set aside, N bundles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from outsize.errors import OptionError
from outsize.kernels.backend import Backend
from outsize.model.predictors.choose import Rule
from outsize.pack.neuron_file import CHOICES, CHUNKS, IMPORTANCE, MOST_GAP

MOST = 1 << 22  # numbers that a quantile is taken of
ROWS, HALVINGS = 512, 30  # of the search for a share
WORTHLESS = 0.01  # this share of the scores shows what a bundle scores that is worth nothing
ALL = -3e38  # all scores are above it


@dataclass(frozen=True, slots=True)
class Choice:
    """How bundles are chosen. `gap`: what beginning a read costs, in bundles that are read along; None: not
    measured yet."""

    by: str = IMPORTANCE
    gap: float | None = None

    def __str__(self) -> str:
        return self.by if self.gap is None else f"{self.by}:{self.gap:g}"


def parse(text: str) -> Choice:
    """`importance`, `chunks`, or `chunks:2.5` with a price that is not measured. Raises OptionError."""
    by, colon, said = text.partition(":")
    try:
        gap = float(said) if colon else None
    except ValueError:
        gap = -1.0
    if by not in CHOICES or (colon and by != CHUNKS):
        raise OptionError(f"choose is {text!r}; known are importance, chunks and chunks:GAP")
    if gap is not None and not 0 <= gap <= MOST_GAP:
        raise OptionError(
            f"choose is {text!r}: what beginning a read costs, in bundles read along, is a number from 0 to "
            f"{MOST_GAP:,.0f}; leave it out to have it measured"
        )
    return Choice(by, gap)


def fitted(scores_TN: Tensor, share: float, choice: Choice, exact: bool, backend: Backend) -> Rule:
    """The rule by which about such a share of the bundles is chosen on these tokens; an exact one chooses
    what fires."""
    gap = choice.gap if choice.by == CHUNKS else None
    if exact:
        return Rule(0.0, None if gap is None else _fp32(gap), True)
    if share >= 1:
        return Rule(ALL, None if gap is None else 0.0)
    if not gap:
        return Rule(quantile(scores_TN, share), gap)
    return _searched(scores_TN, share, gap, backend)


def _searched(scores_TN: Tensor, share: float, gap: float, backend: Backend) -> Rule:
    """Prices of bundles are tried by halving: the dearer, the fewer are chosen, or nearly so; the one that
    comes nearest is kept."""
    some = scores_TN[:: -(-len(scores_TN) // ROWS)].float().contiguous()
    floor = quantile(some, 1 - WORTHLESS)
    low, high = 0.0, max(float(some.max()) - floor, 1e-30)
    best, nearest = Rule(floor), 2.0
    for _ in range(HALVINGS):
        price = (low + high) / 2
        rule = Rule(_fp32(floor + price), _fp32(gap * price))
        found = float(rule.chosen(some, backend).float().mean())
        if abs(found - share) < nearest:
            best, nearest = rule, abs(found - share)
        low, high = (price, high) if found > share else (low, price)
    return best


def _fp32(x: float) -> float:
    """As the file keeps it."""
    return float(torch.tensor(x, dtype=torch.float32, device="cpu"))


def quantile(x: Tensor, share: float) -> float:
    """What all but such a share of some numbers are no larger than; below all for a share of 1."""
    if share >= 1:
        return ALL
    flat = x.flatten().float()
    flat = flat[:: -(-len(flat) // MOST)]
    return float(torch.quantile(flat, 1 - share))


def runs(chosen_TN: Tensor) -> float:
    """Of neighbours that are chosen, for a token on average."""
    begins = chosen_TN[:, 1:] & ~chosen_TN[:, :-1]
    return float(begins.sum(1).float().mean() + chosen_TN[:, 0].float().mean())
