"""A distribution over tokens, from which one can be drawn."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Probs(NamedTuple):
    """Tokens, and how likely each is, up to a factor; all others are impossible."""

    ids: NDArray[np.intp]
    weight: NDArray[np.float64]

    def of(self, id: int) -> float:
        """One token's probability."""
        return float(self.weight[self.ids == id].sum() / self.weight.sum())

    def draw(self, random: np.random.Generator) -> int:
        at = random.random() * self.weight.sum()
        place = np.searchsorted(np.cumsum(self.weight), at, side="right")
        return int(self.ids[min(int(place), len(self.ids) - 1)])
