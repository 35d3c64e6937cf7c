"""Sums and gathers that round nothing but a long span's sum.

Every rank's part goes to every other as it is, and each adds them up in fp32 in order of ranks: the same
bits everywhere, and a row's sum depends on that row alone. From three ranks on, long spans go by two steps
(each rank sums some of the rows and sends them to all), which is less to send: 4 D (p - 1) / p bytes a token
instead of 2 D (p - 1) for bf16; there the sum is rounded to the parts' dtype once more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from outsize.parallel.collective import Pending, Point
from outsize.parallel.dropped import NO_DROP, Drop
from outsize.parallel.lane import Lane
from outsize.parallel.rooms import Rooms, as_bytes
from outsize.parallel.transport import Buffer, Transport, others

TWO_STEP_ROWS = (
    64  # no step of drafts or of a batch is so long: its rows keep their bits in company
)


def in_two_steps(world: int, rows: int) -> bool:
    return world >= 3 and rows >= max(TWO_STEP_ROWS, 8 * world)


def sum_in_order(parts: Sequence[Tensor]) -> Tensor:
    """fp32, the first part first."""
    total = parts[0].to(torch.float32, copy=True)
    for part in parts[1:]:
        total += part
    return total


def share(rows: int, rank: int, world: int) -> slice:
    """The rows that one rank sums in the first of two steps."""
    return slice(rows * rank // world, rows * (rank + 1) // world)


class Exact:
    """A Collective (collective.py) of whole numbers as they are."""

    def __init__(self, transport: Transport, drop: Drop = NO_DROP) -> None:
        self.drop = drop
        self.transport, self.rank, self.world = transport, transport.rank, transport.world
        self._peers, self.lane, self._rooms = others(self.rank, self.world), Lane(), Rooms()

    def sum(self, part_TD: Tensor, at: Point) -> Pending:
        part = part_TD.contiguous()
        run = self._two_steps if in_two_steps(self.world, len(part)) else self._direct
        return self.lane.run(part.nbytes, lambda: run(part))

    def gather(self, part_TN: Tensor, at: Point, widths: Sequence[int]) -> Pending:
        part = part_TN.contiguous()
        return self.lane.run(
            part.nbytes,
            lambda: torch.cat(self.of_all(part, [(len(part), w) for w in widths]), dim=1),
        )

    def _direct(self, part: Tensor) -> Tensor:
        return sum_in_order(self.of_all(part, [tuple(part.shape)] * self.world))

    def _two_steps(self, part: Tensor) -> Tensor:
        shares = [share(len(part), r, self.world) for r in range(self.world)]
        mine = part[shares[self.rank]]
        parts = self.scattered({r: as_bytes(part[shares[r]]) for r in self._peers}, mine)
        summed = sum_in_order(parts).to(part.dtype)
        shapes = [(s.stop - s.start, part.shape[1]) for s in shares]
        return torch.cat(self.of_all(summed, shapes)).float()

    def scattered(self, out: Mapping[int, Buffer], mine: Tensor) -> list[Tensor]:
        """What each rank has for this one, in order of ranks, while `out` goes to the others; `mine` is this
        rank's own, and all are of its shape."""
        box = self._rooms.inbox({r: tuple(mine.shape) for r in self._peers}, mine.dtype)
        self.transport.scatter(out, box.buffers)
        return [box.tensors.get(r, mine) for r in range(self.world)]

    def of_all(self, part: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Every rank's tensor, of these shapes, in order of ranks."""
        box = self._rooms.inbox({r: shapes[r] for r in self._peers}, part.dtype)
        self.transport.exchange(as_bytes(part), box.buffers)
        return [box.tensors.get(r, part) for r in range(self.world)]
