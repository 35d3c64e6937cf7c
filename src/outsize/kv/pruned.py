"""Tokens of one prompt that were pruned on the way: how many layers each has been through, and the hidden
state that it left the last of them with.

As sets of tokens that go on are nested, a token has entries in layers 0 to depth - 1 and nowhere else; so one
whole number and one state say all (arXiv 2407.14057 keeps a cache of states for each layer).
Shapes: P tokens, D model width.
"""

from __future__ import annotations

from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Pruned:
    """Rows in any order: `tokens` (P,) are positions, `depth` (P,) layers done, `states` (P, D) fp32 the
    outputs of layer depth - 1; None where no layer will be run for them any more."""

    def __init__(
        self, tokens: NDArray[np.int64], depth: NDArray[np.int64], states_PD: Tensor | None
    ) -> None:
        self.tokens, self.depth, self.states_PD = tokens, depth, states_PD
        self._width = 0 if states_PD is None else states_PD.shape[1]

    def before(self, length: int) -> Pruned:
        """Those at positions before `length`."""
        kept = self.tokens < length
        if kept.all():
            return self
        states_PD = None if self.states_PD is None else self.states_PD[torch.from_numpy(kept)]
        return Pruned(self.tokens[kept], self.depth[kept], states_PD)

    def missing(self, num_layers: int) -> int:
        """(token, layer) pairs that were not computed."""
        return int((num_layers - self.depth).sum())

    def write(self, file: BinaryIO) -> None:
        """The states into a file; their memory is let go. `room` gives it again, to read them into."""
        if self.states_PD is not None:
            file.write(self.states_PD.contiguous().numpy().data)
            self.states_PD = None

    def room(self) -> Tensor | None:
        """Memory for the states that `write` has written; None where there were none."""
        if self._width:
            shape = len(self.tokens), self._width
            self.states_PD = torch.empty(shape, dtype=torch.float32, device="cpu")
        return self.states_PD

    def forget(self) -> None:
        """No layer will be run for them any more."""
        self.states_PD, self._width = None, 0
