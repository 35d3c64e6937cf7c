"""Block-to-block distillation (Sync-Point Drop, arXiv 2502.20727, section 4) of a block whose sum after
attention is left out: the block with both sums is the teacher, and what the ranks' feed-forwards give
together is to be the same. The paper trains the block's own weights; here they stay as they are, and what is
added, the corrections' factors, learns, beginning with those of the closed form: a file of corrections, and
whatever runs it, is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import cos, pi

import torch
from torch import Tensor

from outsize.adapt.sync.blocks import Block, Range, parts
from outsize.parallel.dropped import Correction

ROWS = 512  # tokens of a step
RATE = 0.02  # of a factor's own size
APART = 4  # one token in so many is not learnt from: it says whether learning helped
Progress = Callable[[int], None]


class Distilled:
    """One block, cut."""

    def __init__(
        self, block: Block, neurons: Sequence[Range], heads: tuple[Sequence[int], Sequence[int]]
    ) -> None:
        """`heads`: the order of key heads, and where each rank's end."""
        self._block, self._neurons = block, neurons
        with torch.no_grad():
            by_key = block.by_key()
            self._parts = parts(by_key, *heads)
            self._whole = torch.stack(by_key).sum(0)
            count = len(block.x_TD)
            pieces = [slice(at, min(at + ROWS, count)) for at in range(0, count, ROWS)]
            due = [block.ffns([self._whole[r]] * len(neurons), neurons, r) for r in pieces]
        self._due = torch.cat(due)
        self._learnt = [i for i in range(count) if i // ROWS % APART < APART - 1] or [*range(count)]
        self._apart = [i for i in range(count) if i // ROWS % APART == APART - 1] or self._learnt

    def error(self, corrections: Sequence[Correction | None]) -> float:
        """Mean square of what the ranks' feed-forwards give wrong, on tokens that are not learnt from."""
        with torch.no_grad():
            rows = torch.tensor(self._apart, dtype=torch.int64, device="cpu")
            return float(torch.stack([self._loss(corrections, r) for r in rows.split(ROWS)]).mean())

    def learn(
        self,
        begun: Sequence[Correction],
        steps: int,
        seed: int = 0,
        told: Progress = lambda _: None,
    ) -> list[Correction]:
        """Corrections of all ranks after so many steps; those they began with, where learning did not
        help."""
        made = [Correction(_learning(c.first), _learning(c.second)) for c in begun]
        factors = [t for c in made for t in (c.first, c.second)]
        groups = [{"params": [t], "lr": RATE * _size(t), "size": _size(t)} for t in factors]
        optimizer, dice = (
            torch.optim.Adam(groups, betas=(0.9, 0.99)),
            torch.Generator().manual_seed(seed),
        )
        learnt = torch.tensor(self._learnt, dtype=torch.int64, device="cpu")
        scale = max(self.error([None] * len(begun)), 1e-30)
        for step in range(steps):
            told(step)
            for group in optimizer.param_groups:
                group["lr"] = RATE * group["size"] * 0.5 * (1 + cos(pi * step / steps))
            some = learnt[torch.randint(len(learnt), (ROWS,), generator=dice)]
            loss = self._loss(made, some) / scale
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        after = [Correction(c.first.detach(), c.second.detach()) for c in made]
        return after if self.error(after) < self.error(begun) else list(begun)

    def _loss(self, corrections: Sequence[Correction | None], rows: Tensor) -> Tensor:
        normed = self._block.normed_TD[rows]
        guesses = [
            part[rows] if c is None else part[rows] + c(normed, part[rows])
            for part, c in zip(self._parts, corrections, strict=True)
        ]
        found = self._block.ffns(guesses, self._neurons, rows)
        return (found - self._due[rows]).square().mean()


def _learning(factor: Tensor) -> Tensor:
    return factor.detach().clone().float().requires_grad_()


def _size(factor: Tensor) -> float:
    return max(float(factor.detach().square().mean().sqrt()), 1e-8)
