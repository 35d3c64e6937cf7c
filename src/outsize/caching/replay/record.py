"""Records the routing of an open model as a trace (CSV), which `caching/replay/trace.py` reads."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import TextIO

from outsize.caching.prefetcher import Scored

COLUMNS = ("turn", "phase", "step", "layer", "slot", "expert", "weight", "early", "early_weight")


class Recorder:
    """Writes what each layer chooses. What a layer's gate says early arrives with the layer before it."""

    def __init__(self, out: TextIO) -> None:
        self._write = csv.writer(out, lineterminator="\n").writerow
        self._turn, self._phase, self._step, self._tokens = 0, 0, 0, 0
        self._early: Scored = ()  # arrived with the layer before

    def begin(self, turn: int) -> None:
        """A new prompt."""
        self._turn, self._phase, self._step, self._tokens = turn, 0, 0, 0
        self._early = ()

    def __call__(
        self,
        layer: int,
        rows: Sequence[Sequence[int]],
        weights: Sequence[Sequence[float]],
        early: Scored,
    ) -> None:
        if layer == 0:
            self._step += self._tokens
            self._phase = int(self._step > 0)
            self._tokens = len(rows)
        mine, self._early = self._early, early
        for at, (ids, ws) in enumerate(zip(rows, weights, strict=True)):
            last = at == len(rows) - 1  # the early gate speaks of the last token
            for slot in range(max(len(ids), len(mine) if last else 0)):
                chosen = (ids[slot], round(ws[slot], 6)) if slot < len(ids) else (-1, 0)
                ahead = (
                    (mine[slot][0], round(mine[slot][1], 6))
                    if last and slot < len(mine)
                    else (-1, 0)
                )
                self._write(
                    [self._turn, self._phase, self._step + at, layer, slot, *chosen, *ahead]
                )
