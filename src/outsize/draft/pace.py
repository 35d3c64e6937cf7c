"""How long a step takes: reading, which does not depend on its rows, or computing, which does, whichever is
longer.

Computing is a plane over rows and whether masks are among them, fitted as steps go by and slowly
forgetting; what a step waited for the disk tells the two apart. One pace serves all sequences of a model,
since they share its steps.
"""

from __future__ import annotations

FORGET, LEARN = 0.98, 0.2
ROW, MASKED = (
    0.1,
    0.7,
)  # what another row, and having masks at all, cost, in steps, before any was seen
FAR = 16  # rows
TRUST = 0.3  # weight of that prior
UNHIDDEN = 0.25  # of the shorter of reading and computing, that the longer does not hide
WAITING = 0.1  # from this share of a step on it is said to wait for the disk
Vector = tuple[float, float, float]
START: Vector = (1 - ROW, ROW, MASKED)
PRIOR: tuple[Vector, ...] = ((1.0, 1.0, 0.0), (1.0, 1.0 + FAR, 0.0), (1.0, 1.0, 1.0))


class Pace:
    """Least squares over (1, rows, masked) -> seconds of computing, the latest steps counting most."""

    def __init__(self) -> None:
        self._sums = [0.0] * 9  # of xx (upper triangle, by rows), then of x * seconds
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

    def _fit(self, x: Vector, computing: float) -> None:
        if self._one:
            computing = min(computing, 1.5 * _dot(self._plane, x))
        else:
            self._one = computing / _dot(START, x)
        self._sums = [FORGET * s for s in self._sums]
        _add(self._sums, x, computing, 1.0)
        sums = list(self._sums)
        for p in PRIOR:
            _add(sums, p, _dot(START, p) * self._one, TRUST)
        self._plane = _solved(sums)

    def seconds(self, rows: float, masked: bool = False) -> float:
        """Of a step; before any step, in units of one row's. Another row never makes it shorter."""
        base, row, masks = self._plane
        computing = base + row + max(row, 0.0) * (rows - 1) + (max(masks, 0.0) if masked else 0.0)
        computing = max(computing, 0.2 * (base + row))
        longer, shorter = max(computing, self._reading), min(computing, self._reading)
        return longer + UNHIDDEN * shorter


def _dot(a: Vector, b: Vector) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _add(sums: list[float], x: Vector, seconds: float, weight: float) -> None:
    at = 0
    for i in range(3):
        for j in range(i, 3):
            sums[at] += weight * x[i] * x[j]
            at += 1
    for i in range(3):
        sums[6 + i] += weight * x[i] * seconds


def _solved(sums: list[float]) -> Vector:
    """The plane: three equations by Cramer's rule."""
    a, b, c, d, e, f, p, q, r = sums
    whole = a * (d * f - e * e) - b * (b * f - c * e) + c * (b * e - c * d)
    x = p * (d * f - e * e) - b * (q * f - r * e) + c * (q * e - r * d)
    y = a * (q * f - r * e) - p * (b * f - c * e) + c * (b * r - c * q)
    z = a * (d * r - e * q) - b * (b * r - c * q) + p * (b * e - c * d)
    return x / whole, y / whole, z / whole
