"""Echo, our default for experts: a frequency mixture with nearest-neighbour routing history. The expert least
likely to be used soon is evicted first.

The remembered tokens (nearest neighbours) whose experts so far were most like the present token's predict
what it will ask for in the next layers, and the tokens that came after them what the next token will ask
for. That is mixed with each expert's recent frequency (the mean of four exponentially decaying ones). A
candidate's worth is its probability at its layer's next visit plus its mean rate, over how long it must be
kept: (p + b) / (d + L), for d layers until that visit and L layers. Hit rates: docs/results/specmd.md.

This takes longer than reading a record allows to wait. So the history is updated, and the next layer's
victims are ranked, while what a layer asked for is being read (`finish_ranking`).

Shapes: W remembered tokens, L layers, E experts of a layer, I = L * E.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from outsize.caching.policy import EvictionPolicy, Hints

Floats = NDArray[np.float32]

DECAYS = np.array([0.3, 0.7, 0.9, 0.97], np.float32)  # of the frequencies, a token
PRIOR = 1.0  # tokens' worth of prior belief that all experts are alike
WINDOW = 256  # tokens remembered, at least half of them at any time
SHARPNESS, FADING = 9.0, 0.9  # of similarity: its weight, and its decay by layer
TRUST, AFTER = (
    0.8,
    0.7,
)  # of the history in the mixture, for this token's next layers and for the next token
BYTES = 4 * (WINDOW + 9) + 16  # of memory for each expert
REACH = 2  # layers ahead that are predicted for this token
RANKED = 32  # victims at a time


class Echo(EvictionPolicy):
    def __init__(self, capacity: int, hints: Hints) -> None:
        super().__init__(capacity, hints)
        layers, experts = hints.layers, hints.per_layer
        self._layers, self._experts, self._layer, self._used = layers, experts, 0, 1.0
        size = layers * experts
        self._of_layer = np.arange(size) // experts
        self._resident = np.zeros(size, bool)
        self._often = np.zeros((len(DECAYS), layers, experts), np.float32)
        self._seen = np.zeros((len(DECAYS), layers), np.float32)
        self._rate = np.zeros((layers, experts), np.float32)
        self._next = np.zeros((layers, experts), np.float32)
        self._past = np.zeros((layers, WINDOW, experts), np.float32)
        self._num_past, self._rows = 0, 1  # tokens remembered whole; of the running pass
        self._alike, self._most = np.zeros(WINDOW, np.float32), 0.0
        self._victims: list[int] = []
        self._later = self._next[0]
        self._observed: tuple[int, Sequence[Sequence[int]]] | None = None

    def begin_pass(self) -> None:
        """The last pass's tokens are remembered."""
        self._num_past += self._rows if self._most else 0
        if self._num_past + 1 >= WINDOW:
            keep = WINDOW // 2
            self._past[:, :keep] = self._past[:, self._num_past - keep : self._num_past]
            self._num_past = keep
        self._past[:, self._num_past : self._num_past + 1] = 0
        self._alike[:], self._most = 0, 0.0

    def observe(self, layer: int, rows: Sequence[Sequence[int]]) -> None:
        self._observed = layer, rows

    def finish_ranking(self) -> None:
        if self._capacity >= len(self._resident):
            return  # nothing will ever be evicted
        if self._observed is not None:
            self._learn(*self._observed)
            self._observed = None
        self._victims = self._worst((), self._layer + 1)

    def _learn(self, layer: int, rows: Sequence[Sequence[int]]) -> None:
        rows = rows[-(WINDOW // 2) :]
        self._layer, self._rows = layer, len(rows)
        self._rows = min(len(rows), WINDOW - self._num_past)
        for at, ids in enumerate(rows):
            chosen = np.asarray(ids, np.intp) - layer * self._experts
            self._often[:, layer] *= DECAYS[:, None]
            self._often[:, layer, chosen] += 1
            self._seen[:, layer] = self._seen[:, layer] * DECAYS + 1
            if at < self._rows:
                self._past[layer, self._num_past + at] = 0
                self._past[layer, self._num_past + at, chosen] = 1
        self._used = len(rows[-1])
        belief = PRIOR * self._used / self._experts
        often = (self._often[:, layer] + belief) / (self._seen[:, layer, None] + PRIOR)
        self._rate[layer] = self._next[layer] = often.sum(0) / len(DECAYS)
        self._later = self._next[(layer + 1) % self._layers]
        self._predict(layer, chosen)

    def _predict(self, layer: int, chosen: NDArray[np.intp]) -> None:
        """Update the probabilities of this token's next layers, and of this layer for the next token."""
        count = self._num_past
        self._alike[:count] *= FADING
        chosen_E = np.zeros(self._experts, np.float32)
        chosen_E[chosen] = 1
        self._alike[:count] += self._past[layer, :count] @ chosen_E
        self._most = self._most * FADING + len(chosen)
        if count < 2 or self._rows > 1 or not self._most:
            return
        weight = np.exp(SHARPNESS * self._alike[:count] / self._most)
        ahead = slice(layer + 1, layer + 1 + REACH)
        self._next[ahead] = self._mixed(ahead, TRUST, weight, self._past[ahead, :count])
        here = slice(layer, layer + 2)  # and of the next layer, once it has been asked
        both = self._mixed(here, AFTER, weight[:-1], self._past[here, 1:count])
        self._next[layer] = both[0]
        if len(both) > 1:
            self._later = both[1]

    def _mixed(self, layers: slice, trust: float, weight: Floats, past: Floats) -> Floats:
        """(L, E) probabilities: the weighted mean of remembered tokens, mixed with the rates."""
        seen = np.matmul(weight / weight.sum(), past)
        mixed: Floats = (1 - trust) * self._rate[layers] + trust * seen
        return mixed

    def used(self, id: int) -> None:
        self._resident[id] = True

    def victim(self, staying: Collection[int]) -> int:
        found = next(self._ready(staying), None)
        if found is None:
            self._victims = self._worst(staying, self._layer)
            found = self._victims.pop()
        self._resident[found] = False
        return found

    def _ready(self, staying: Collection[int]) -> Iterator[int]:
        """Of those ranked before, the ones that may be evicted."""
        while self._victims:
            id = self._victims.pop()
            if id not in staying and self._resident[id]:
                yield id

    def _worst(self, staying: Collection[int], layer: int) -> list[int]:
        """Some residents of the least worth while `layer` runs, the least last."""
        is_free = self._resident.copy()
        is_free[list(staying)] = False
        ids = np.flatnonzero(is_free)
        away = (self._of_layer[ids] - layer - 1) % self._layers + 1
        soon = self._next.reshape(-1)[ids]
        if (
            layer != self._layer
        ):  # of its own experts, those that it will not have asked for can be evicted
            own = away == self._layers
            soon[own] = self._later[ids[own] % self._experts]
        chance = soon + self._rate.reshape(-1)[ids]
        worth = chance / (away + self._layers)
        some = min(len(ids), max(RANKED, len(staying)))
        if not some:
            return []
        worst = np.argpartition(worth, some - 1)[:some]
        found: list[int] = ids[worst[np.argsort(-worth[worst], kind="stable")]].tolist()
        return found


policy = Echo
