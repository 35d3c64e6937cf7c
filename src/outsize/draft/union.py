"""How many experts a step of several tokens needs: the union of what they choose, which is what is read and
multiplied."""

from __future__ import annotations

LEARN = 0.1


class Union:
    """In units of what one token chooses. Between tokens that choose alike (1, whatever the rows) and those
    that choose for themselves; which it is, is followed."""

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
            self._apart += LEARN * (now - self._apart)

    def units(self, rows: float) -> float:
        """Of a step of so many rows."""
        return 1 + self._apart * (self._alone(rows) - 1)

    def _alone(self, rows: float) -> float:
        """If each chose for itself."""
        missed: float = (1 - self._used / self._count) ** rows
        return self._count / self._used * (1 - missed)
