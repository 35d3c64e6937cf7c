"""How long a step takes: reading, which does not depend on its rows, or computing, which does, whichever is
longer.

Computing is a plane over rows and whether masks are among them, fitted as steps go by and slowly
forgetting; what a step waited for the disk tells the two apart. One pace serves all sequences of a model,
since they share its steps.
"""

from __future__ import annotations

import numpy as np

FORGET, LEARN = 0.98, 0.2
ROW, MASKED = (
    0.1,
    0.7,
)  # what another row, and having masks at all, cost, in steps, before any was seen
FAR = 16  # rows
TRUST = 0.3  # weight of that prior
UNHIDDEN = 0.25  # of the shorter of the two, that the longer does not hide
WAITING = 0.1  # from this share of a step on it is said to wait for the disk
START = np.array([1 - ROW, ROW, MASKED])


class Pace:
    """Least squares over (1, rows, masked) -> seconds of computing, the latest steps counting most."""

    def __init__(self) -> None:
        self._xx, self._xt = np.zeros((3, 3)), np.zeros(3)
        self._plane = START  # in steps, as long as none was seen
        self._one = 0.0
        self._reading = 0.0
        self._masks_seen = False
        self.rows = 1  # of the last step

    def step(self, rows: int, masked: bool, seconds: float, waited: float) -> None:
        """A step took so long, of which it waited for the disk. One that was disturbed counts as a slow
        one, no more; the first with masks pays for what is then warm."""
        self.rows = rows
        if waited > WAITING * seconds:
            reading = seconds - UNHIDDEN * (seconds - waited)
            self._reading += (LEARN if self._reading else 1.0) * (reading - self._reading)
        elif rows <= 2:
            self._reading *= 1 - LEARN
        if masked and not self._masks_seen:
            self._masks_seen = True
            return
        self._fit((1.0, float(rows), float(masked)), seconds - waited)

    def _fit(self, x: tuple[float, float, float], computing: float) -> None:
        if self._one:
            computing = min(computing, 2 * float(self._plane @ x))
        else:
            self._one = computing / float(START @ x)
        self._xx = self._xx * FORGET + np.outer(x, x)
        self._xt = self._xt * FORGET + computing * np.array(x)
        xx, xt = self._xx.copy(), self._xt.copy()
        for p in ((1.0, 1.0, 0.0), (1.0, 1.0 + FAR, 0.0), (1.0, 1.0, 1.0)):
            xx += TRUST * np.outer(p, p)
            xt += TRUST * np.array(p) * float(START @ p) * self._one
        self._plane = np.linalg.solve(xx, xt)

    def seconds(self, rows: float, masked: bool = False) -> float:
        """Of a step; before any step, in units of one row's. Another row never makes it shorter."""
        base, row, masks = (float(v) for v in self._plane)
        computing = base + row + max(row, 0.0) * (rows - 1) + (max(masks, 0.0) if masked else 0.0)
        computing = max(computing, 0.2 * (base + row))
        longer, shorter = max(computing, self._reading), min(computing, self._reading)
        return longer + UNHIDDEN * shorter
