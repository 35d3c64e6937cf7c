"""Step-time model: how long a step of so many rows takes. Reading, which does not depend on its rows, or
computing, which does, whichever is longer. Where rows choose experts, both follow the union of their choices.

Computing is a plane over rows and whether masks are among them, fitted as steps go by and slowly
forgetting; what a step waited for the disk tells the two apart. One serves all sequences of a model, since
they share its steps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FORGET, LEARN, LEARN_UNION = 0.98, 0.2, 0.1
ROW, MASKED = 0.1, 0.7  # what another row, and any masks, cost, in steps, before any was seen
FAR = 16  # rows
TRUST = 0.3  # weight of that prior
SLOWER = 1.02  # what one row's time, the least seen, grows by a step, so that it is seen anew
DISTURBED = 1.5  # times what a step should take, at most, is believed
UNHIDDEN = 0.1  # of computing, that reading does not hide where it takes longer
WAITING = 0.1  # from this share of a step on it is said to wait for the disk
Vector = NDArray[np.float64]
START = np.array([1 - ROW, ROW, MASKED])
PRIOR = np.array([[1.0, 1.0, 0.0], [1.0, 1.0 + FAR, 0.0], [1.0, 1.0, 1.0]])
TERMS = ((0, 1, 2), (0, 1), (0, 2), (0,))  # of the plane, as many as come out positive


class ExpertUnion:
    """How many experts the rows of a step choose together: those are read and multiplied. In units of
    what one token chooses: between tokens that choose alike (1, whatever the rows) and those that choose for
    themselves; which it is, is followed."""

    def __init__(self, count: int, used: int) -> None:
        """`count` experts a layer, of which a token chooses `used`."""
        self._count, self._used = count, used
        self._one = 0.0  # experts that one row asks for, over all layers
        self._apart = 1.0  # 0: tokens choose alike, 1: each for itself

    def saw(self, rows: int, asked: int) -> None:
        """A step asked for so many experts, over all layers."""
        if not asked:
            return
        if rows == 1:
            self._one = float(asked)
        elif self._one and (most := self._alone(rows) - 1) > 0:
            now = min(1.0, max(0.0, (asked / self._one - 1) / most))
            self._apart += LEARN_UNION * (now - self._apart)

    def units(self, rows: float) -> float:
        """Of a step of so many rows."""
        return 1 + self._apart * (self._alone(rows) - 1)

    def _alone(self, rows: float) -> float:
        """If each chose for itself."""
        missed: float = (1 - self._used / self._count) ** rows
        return self._count / self._used * (1 - missed)


class StepTimes:
    """Least squares over (1, rows, masked) -> seconds of computing, the latest steps counting most."""

    def __init__(self, union: ExpertUnion | None = None) -> None:
        """`union`: of a model with experts."""
        self._union = union
        self._squares, self._products = np.zeros((3, 3)), np.zeros(3)
        self._plane = tuple(START.tolist())  # in steps, as long as none was seen
        self._one = 0.0
        self._reading = 0.0
        self._masks_seen = False
        self.rows = 1  # of the last step
        self.last_s = 0.0  # what it took; one that was disturbed counts as a slow one, no more

    def step(self, rows: int, masked: bool, seconds: float, waited: float, asked: int = 0) -> None:
        """A step took so long, of which it waited for the disk, and asked for so many experts. One that was
        disturbed counts as a slow one, no more; the first with masks pays for what is then warm."""
        if self._union is not None:
            self._union.saw(rows, asked)
        self.rows = rows
        self.last_s = min(seconds, DISTURBED * self.seconds(rows, masked)) if self._one else seconds
        computing = seconds - waited  # reads take some of it, too, whatever the rows
        reading = (seconds - UNHIDDEN * computing) / self._readings(rows)
        if waited > WAITING * seconds:
            self._reading += (LEARN if self._reading else 1.0) * (reading - self._reading)
        else:  # at most
            self._reading = min(self._reading, reading)
        if not waited and rows <= 2:
            self._reading *= 1 - LEARN
        if masked and not self._masks_seen:
            self._masks_seen = True
            return
        self._fit(np.array([1.0, self._rows(rows), masked]), computing)

    def _fit(self, x: Vector, computing: float) -> None:
        if self._one:
            computing = min(computing, DISTURBED * float(x @ self._plane))
        ratio = computing / float(x @ START)
        self._one = min(SLOWER * self._one, ratio) if self._one else ratio
        self._squares = FORGET * self._squares + np.outer(x, x)
        self._products = FORGET * self._products + computing * x
        squares = self._squares + TRUST * PRIOR.T @ PRIOR
        products = self._products + TRUST * self._one * (PRIOR.T @ (PRIOR @ START))
        self._plane = _positive(squares, products)

    @property
    def reads(self) -> bool:
        """Does a step wait for the disk, so that more rows cost little?"""
        base, row, _ = self._plane
        return bool(self._reading > base + row)

    def seconds(self, rows: float, masked: bool = False) -> float:
        """Of a step; before any step, in units of one row's. Another row never makes it shorter."""
        base, row, masks = self._plane
        computing: float = base + row * self._rows(rows) + (masks if masked else 0.0)
        return max(computing, self._reading * self._readings(rows) + UNHIDDEN * computing)

    def _rows(self, rows: float) -> float:
        """What computing follows."""
        return rows if self._union is None else self._union.units(rows)

    def _readings(self, rows: float) -> float:
        """What is read, in units of what one row reads."""
        return 1.0 if self._union is None else self._union.units(rows)


def _positive(squares: Vector, products: Vector) -> tuple[float, ...]:
    """The plane, without the terms that would take time away: clamped to nothing afterwards, they would
    leave the others as much too large as they were below."""
    plane = np.zeros(3)
    for terms in TERMS:
        found = np.linalg.solve(squares[np.ix_(terms, terms)], products[list(terms)])
        if (found > 0).all():
            plane[list(terms)] = found
            break
    return tuple(plane.tolist())
