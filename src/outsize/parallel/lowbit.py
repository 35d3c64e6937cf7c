"""Sums in fewer bits on the wire: each rank's part is packed; all are unpacked and added in order of ranks.

Lossy; the same bits on all ranks, since each adds up what went over the wire, its own part included. Turned
(kernels/turned.py) needs no calibration; Static (static.py) is the paper's (arXiv 2411.07942). From three
ranks on, long spans go by two steps where the codec can: each rank sums some of the rows in turned space and
sends that sum packed, `bits` * D / 4 * (p - 1) / p bytes a token instead of `bits` * D / 8 * (p - 1), and one
rounding more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from outsize.kernels.turned import Turner
from outsize.parallel.collective import Pending, Point
from outsize.parallel.exact import Exact, in_two_steps, share
from outsize.parallel.rooms import as_bytes
from outsize.parallel.transport import others


class Codec(Protocol):
    """How parts become messages at a point, and messages a sum."""

    def pack(self, part_TD: Tensor, at: Point) -> Tensor:
        """(T, bytes) uint8, contiguous."""

    def sum(self, messages: Sequence[Tensor], width: int, at: Point) -> Tensor:
        """(T, width) fp32 of every rank's message, in order of ranks."""


@runtime_checkable
class TwoStepCodec(Codec, Protocol):
    """One that packs sums, too."""

    def repack(self, messages: Sequence[Tensor], width: int) -> Tensor:
        """The message of the messages' sum."""

    def unpack(self, message: Tensor, width: int) -> Tensor:
        """(T, width) fp32 of a message of `repack`."""


class Turned:
    """Codec of Hadamard blocks, the same at every point."""

    def __init__(self, turner: Turner) -> None:
        self._turner = turner

    def pack(self, part_TD: Tensor, at: Point) -> Tensor:
        return self._turner.pack(part_TD)

    def sum(self, messages: Sequence[Tensor], width: int, at: Point) -> Tensor:
        return self._turner.sum(messages, width)

    def repack(self, messages: Sequence[Tensor], width: int) -> Tensor:
        return self._turner.pack(self._turner.sum(messages, width, turned=True), turned=True)

    def unpack(self, message: Tensor, width: int) -> Tensor:
        return self._turner.sum([message], width)


class LowBit:
    """A Collective over an exact one: `codec` says what packs at a point, None for 16 bits. Spans of fewer
    than `least` rows go exactly: with a number between 2 and 63, a row's bits then depend on whether it is
    drafted or batched with others. Gathers are always exact."""

    def __init__(
        self, exact: Exact, codec: Callable[[Point], Codec | None], least: int = 1
    ) -> None:
        self.rank, self.world, self.drop = exact.rank, exact.world, exact.drop
        self._exact, self._codec, self._least = exact, codec, least

    def sum(self, part_TD: Tensor, at: Point) -> Pending:
        codec = self._codec(at)
        if codec is None or len(part_TD) < max(self._least, 1):
            return self._exact.sum(part_TD, at)
        message, width = codec.pack(part_TD, at), part_TD.shape[1]

        def run() -> Tensor:
            if in_two_steps(self.world, len(message)) and isinstance(codec, TwoStepCodec):
                return self._two_steps(codec, message, width)
            shapes = [tuple(message.shape)] * self.world
            return codec.sum(self._exact.of_all(message, shapes), width, at)

        return self._exact.lane.run(message.nbytes, run)

    def gather(self, part_TN: Tensor, at: Point, widths: Sequence[int]) -> Pending:
        return self._exact.gather(part_TN, at, widths)

    def _two_steps(self, codec: TwoStepCodec, message: Tensor, width: int) -> Tensor:
        shares = [share(len(message), r, self.world) for r in range(self.world)]
        mine = message[shares[self.rank]]
        out = {r: as_bytes(message[shares[r]]) for r in others(self.rank, self.world)}
        summed = codec.repack(self._exact.scattered(out, mine), width)
        shapes = [(s.stop - s.start, summed.shape[1]) for s in shares]
        return codec.unpack(torch.cat(self._exact.of_all(summed, shapes)), width)
