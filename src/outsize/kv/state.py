"""What a layer without keys and values keeps of a sequence: numbers that each token changes, and the inputs
of the last tokens, for a short convolution.

Draft tokens are forgotten again, and a change of the numbers cannot be taken back. So they are kept twice: as
they are now, and as they were some tokens ago, with the inputs of the tokens since. To forget some of those,
the others are run again from there (`catch_up`), as they ran at first. After a chunk of a prompt, whose
inputs are not kept, only all of it can be forgotten. What lies further back, all of it must be computed anew:
`reachable` says what can be had.

Law: truncate then append equals never having appended.
Shapes: T new tokens, R inputs of a token, G gates of a token, P inputs before the first that are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from outsize.errors import ReadError
from outsize.model_config import Description

KEEP, MOST = 16, 24  # tokens that can be forgotten one by one: so many at least, and at most
STEP = 16  # tokens that a step may add beside
Run = Callable[[Tensor, Tensor, Tensor], object]  # numbers, which change; (P + T, R); (T, G)
STORED = ("base", "now", "_rows_PR", "_gates_TG", "_tail_PR")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a layer's state. `shape`: of the numbers."""

    shape: tuple[int, ...]
    width: int  # of a token's inputs
    gates: int
    before: int  # inputs of the tokens before that are needed

    def nbytes(self, input_bytes: int) -> int:
        """Bytes that it takes at most."""
        numbers, tokens = 2 * 4 * int(np.prod(self.shape)), MOST + STEP
        inputs = (2 * self.before + tokens) * self.width * input_bytes
        return numbers + inputs + 4 * tokens * self.gates


class State:
    """Of one layer and sequence. `now`: its numbers after `end` tokens, unless `is_behind`; `base`: after
    `start` tokens. Both are zeros at first."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype) -> None:
        """`dtype`: of inputs; numbers and gates are in fp32."""
        self.sizes, self._dtype = sizes, dtype
        self.clear()

    def clear(self) -> None:
        """Of no tokens."""
        s = self.sizes
        self.start = self.end = 0
        self.is_behind, self.is_torn = False, False
        self._is_logged = True  # are the inputs of the tokens since `start` kept?
        self.base = self.now = torch.zeros(0, dtype=torch.float32, device="cpu")
        self._rows_PR = torch.zeros(0, s.width, dtype=self._dtype, device="cpu")
        self._gates_TG = torch.zeros(0, s.gates, dtype=torch.float32, device="cpu")
        self._tail_PR = self._rows_PR

    def _zeros(self) -> Tensor:
        return torch.zeros(self.sizes.shape, dtype=torch.float32, device="cpu")

    def _open(self) -> None:
        """Memory is taken with the first token."""
        if len(self._rows_PR):
            return
        s, tokens = self.sizes, MOST + STEP
        self._rows_PR = self._rows_PR.new_zeros(s.before + tokens, s.width)
        self._tail_PR = self._rows_PR.new_zeros(s.before, s.width)
        self._gates_TG = self._gates_TG.new_zeros(tokens, s.gates)
        self.now, self.base = self._zeros(), self._zeros()

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in STORED)

    @property
    def count(self) -> int:
        """Tokens since `start`."""
        return self.end - self.start

    def reachable(self, length: int) -> int:
        """The most tokens, up to `length`, that the sequence can be cut to."""
        if length >= self.end and not self.is_torn:
            return self.end
        if length < self.start or self.is_torn:
            return 0
        return length if self._is_logged else self.start

    def truncate(self, length: int) -> None:
        """Forget every token from number `length` on, which must be reachable."""
        if length == 0:
            self.clear()
        elif length < self.end:
            assert self.reachable(length) == length, f"{length} of {self.start} to {self.end}"
            self.end, self.is_behind = length, True
            self._is_logged = self._is_logged or length == self.start

    def take(self, rows_TR: Tensor, gates_TG: Tensor, run: Run, wide: bool) -> Tensor:
        """New tokens: (P + T, R), their inputs after the ones before. The caller then changes `now` by them
        and says so (`done`). `run` does that with tokens that ran before; `wide`: a prompt's, whose inputs
        are not kept."""
        self._open()
        self._catch_up(run)
        if wide or not self._is_logged:
            self._settle()
        before, count, new = self.sizes.before, self.count, len(rows_TR)
        self.is_behind = True
        if wide:
            window = torch.cat([self._rows_PR[:before], rows_TR.to(self._dtype)])
            self._tail_PR.copy_(window[len(window) - before :])
            self._is_logged, self.end = False, self.end + new
            return window
        self._make_room(before + count + new)
        self._rows_PR[before + count : before + count + new] = rows_TR
        self._gates_TG[count : count + new] = gates_TG
        self.end += new
        return self._rows_PR[count : before + count + new]

    def done(self, run: Run) -> None:
        """`now` is up to date."""
        self.is_behind = False
        if self._is_logged and self.count > MOST:
            self._move(self.count - KEEP, run)

    def _catch_up(self, run: Run) -> None:
        """Bring `now` to the end: from the base, by the tokens since."""
        if self.is_behind:
            self.now.copy_(self.base)
            if self._is_logged and self.count:
                before = self.sizes.before
                window = self._rows_PR[: before + self.count]
                run(self.now, window, self._gates_TG[: self.count])
            self.is_behind = False

    def _settle(self) -> None:
        """What is now becomes the base."""
        before, count = self.sizes.before, self.count
        if not count:
            self._is_logged = True
            return
        self.is_torn = True
        self.base.copy_(self.now)
        last = self._rows_PR[count : count + before].clone() if self._is_logged else self._tail_PR
        self._rows_PR[:before] = last
        self.start, self._is_logged = self.end, True
        self.is_torn = False

    def _move(self, count: int, run: Run) -> None:
        """The base by so many tokens on."""
        self.is_torn, before, all_rows = True, self.sizes.before, self.sizes.before + self.count
        run(self.base, self._rows_PR[: before + count], self._gates_TG[:count])
        self._rows_PR[: all_rows - count] = self._rows_PR[count:all_rows].clone()
        self._gates_TG[: self.count - count] = self._gates_TG[count : self.count].clone()
        self.start += count
        self.is_torn = False

    def _make_room(self, rows: int) -> None:
        if rows > len(self._rows_PR):
            more = rows - len(self._rows_PR)
            for name in ("_rows_PR", "_gates_TG"):
                old = getattr(self, name)
                setattr(self, name, torch.cat([old, old.new_zeros(more, old.shape[1])]))

    def emptied(self) -> State:
        """Another one of the same kind, of no tokens."""
        return State(self.sizes, self._dtype)

    def write(self, file: BinaryIO) -> None:
        """All numbers into a file, and let their memory go; `read` brings them back, bit by bit."""
        self._shapes = {name: getattr(self, name).shape for name in STORED}
        for name in STORED:
            stored: Tensor = getattr(self, name)
            file.write(_bytes(stored).data)
            setattr(self, name, stored.new_empty(0, *stored.shape[1:]))

    def read(self, file: BinaryIO) -> None:
        """What `write` wrote. Raises ReadError."""
        for name, shape in self._shapes.items():
            stored: Tensor = getattr(self, name)
            stored = stored.new_empty(shape)
            if file.readinto(_bytes(stored).data) != stored.nbytes:  # type: ignore[attr-defined]
                raise ReadError("the file that a state was put aside in is shorter than it was")
            setattr(self, name, stored)


def sizes_of(d: Description, layer: int) -> Sizes | None:
    """Of a layer's state; None: it keeps keys and values."""
    x = d.delta
    if d.layers[layer].mixer == "conv":
        return Sizes((0,), d.width, 0, d.kernel - 1)
    if d.layers[layer].mixer != "delta" or x is None:
        return None
    shape = (x.value_heads, x.key, x.value)
    return Sizes(shape, 2 * x.keys + x.values, 2 * x.value_heads, x.kernel - 1)


def states_of(d: Description, dtype: torch.dtype) -> dict[int, State]:
    """The states of a sequence without tokens, by layer."""
    found = {i: sizes_of(d, i) for i in range(d.num_layers)}
    return {i: State(sizes, dtype) for i, sizes in found.items() if sizes is not None}


def _bytes(x: Tensor) -> NDArray[np.uint8]:
    """The memory of a contiguous tensor."""
    return x.flatten().view(torch.uint8).numpy()
