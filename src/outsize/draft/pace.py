"""How long a step takes by how many rows it has, and whether masks are among them: a plane, fitted as steps
go by and slowly forgetting.

Where weights come from disk it is flat as long as reading hides computing; in memory it rises. One pace
serves all sequences of a model, since they share its steps.
"""

from __future__ import annotations

import numpy as np

FORGET = 0.98
ROW, MASKED = (
    0.1,
    0.7,
)  # what another row, and having masks at all, cost, in steps, before any was seen
FAR = 16  # rows
TRUST = 0.3  # weight of that prior


class Pace:
    """Least squares over (1, rows, masked) -> seconds, the latest steps counting most."""

    def __init__(self) -> None:
        self._xx, self._xt = np.zeros((3, 3)), np.zeros(3)
        self._plane = np.array([1 - ROW, ROW, MASKED])  # in steps, as long as none was seen
        self._one = 0.0
        self.rows = 1  # of the last step

    def step(self, rows: int, masked: bool, seconds: float) -> None:
        """A step took so long. One that was disturbed counts as a slow one, no more."""
        self.rows = rows
        if self._one:
            seconds = min(seconds, 2 * self.seconds(rows, masked))
            self._xx, self._xt = self._xx * FORGET, self._xt * FORGET
        else:
            self._one = seconds / float(self._plane @ (1.0, rows, masked))
        self._add((1.0, rows, masked), seconds, 1.0)
        prior = np.array([1 - ROW, ROW, MASKED]) * self._one
        xx, xt = self._xx.copy(), self._xt.copy()
        for x in ((1.0, 1.0, 0.0), (1.0, 1.0 + FAR, 0.0), (1.0, 1.0, 1.0)):
            xx += TRUST * np.outer(x, x)
            xt += TRUST * np.array(x) * float(prior @ x)
        self._plane = np.linalg.solve(xx, xt)

    def _add(self, x: tuple[float, float, float], seconds: float, weight: float) -> None:
        self._xx += weight * np.outer(x, x)
        self._xt += weight * seconds * np.array(x)

    def seconds(self, rows: float, masked: bool = False) -> float:
        """Of a step; before any step, in units of one row's. Another row never makes it shorter."""
        base, row, masks = (float(v) for v in self._plane)
        least = 0.2 * (base + row)
        return max(
            base + row + max(row, 0.0) * (rows - 1) + (max(masks, 0.0) if masked else 0.0), least
        )
