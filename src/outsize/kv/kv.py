"""The KV cache of one sequence, ragged by layer: each layer keeps its own entries and their positions, so
that a pass may store different tokens in different layers. Entries are sorted by position, whenever they
came.

A layer's storage is (C, capacity, E): key heads, then value heads, each head's entries in a row, so that
reading a head is one sequential run.

Law: truncate then append equals never having appended.
Shapes: T new tokens, S stored tokens, J key heads, C = 2J, E numbers a head.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from outsize.errors import ReadError
from outsize.kv.pruned import Pruned
from outsize.kv.state import State

FIRST = 256  # entries a layer starts with; it doubles when full
NONE: Mapping[int, State] = {}
ALIKE: Mapping[int, tuple[int, int]] = {}
ALL = 1 << 62  # positions
MOVED = 1024  # entries that are copied at once where others are put before them


class KV:
    """One sequence's cache. Views are valid until the next append to their layer."""

    def __init__(
        self,
        num_layers: int,
        sizes: tuple[int, int],
        dtype: torch.dtype,
        room: int = 0,
        states: Mapping[int, State] = NONE,
        others: Mapping[int, tuple[int, int]] = ALIKE,
    ) -> None:
        """`sizes`: key heads, and numbers of a head; `others`: of layers that differ. `room`: entries that
        each layer is given at once, as addresses: memory is taken when an entry is stored, and none is ever
        copied. Beyond, and by default, storage doubles when full. `states`: of the layers that keep those
        instead, by their numbers."""
        self.states, self._sizes, self._others = dict(states), sizes, dict(others)
        rooms = [0 if layer in states else room for layer in range(num_layers)]
        each = [(size, *others.get(layer, sizes)) for layer, size in enumerate(rooms)]
        shapes = [(2 * num_heads, size, head_dim) for size, num_heads, head_dim in each]
        self._stored = [torch.empty(shape, dtype=dtype, device="cpu") for shape in shapes]
        self.positions = [array("i") for _ in range(num_layers)]
        self.pruned: list[Pruned] = []  # of each prompt that not all layers have seen all tokens of
        self.moved = ALL  # since that was last looked at, entries from here on came by no step
        self.torn = False  # a step that moves entries began, and has not ended

    @property
    def nbytes(self) -> int:
        own = sum(t.nbytes for t in self._stored)
        return own + sum(state.nbytes for state in self.states.values())

    @property
    def length(self) -> int:
        """Tokens so far. (Of some a layer may have no entry; of the last, each layer has.)"""
        ends = [
            kept[-1] + 1 if kept else 0
            for i, kept in enumerate(self.positions)
            if i not in self.states
        ]
        return min([*ends, *(state.end for state in self.states.values())])

    def reachable(self, length: int) -> int:
        """The most tokens, up to `length`, that the sequence can be cut to."""
        while (
            least := min([length, *(s.reachable(length) for s in self.states.values())])
        ) < length:
            length = least
        return length

    @property
    def computed(self) -> float:
        """Share of the (token, layer) pairs so far that were computed."""
        if not self.pruned:
            return 1.0
        num_layers = len(self.positions)
        missing = sum(pruned.missing(num_layers) for pruned in self.pruned)
        return 1.0 - missing / max(1, num_layers * self.length)

    def append(self, layer: int, k_TJE: Tensor, v_TJE: Tensor, positions: Sequence[int]) -> Tensor:
        """Store T entries, copied; positions must rise. Returns the view."""
        stored, slots = self.place(layer, positions)
        num_heads = k_TJE.shape[1]
        if isinstance(slots, range):
            stored[:num_heads, slots.start : slots.stop] = k_TJE.transpose(0, 1)
            stored[num_heads:, slots.start : slots.stop] = v_TJE.transpose(0, 1)
        else:
            index = torch.tensor(slots, dtype=torch.int64, device="cpu")
            stored[:num_heads, index] = k_TJE.transpose(0, 1).to(stored.dtype)
            stored[num_heads:, index] = v_TJE.transpose(0, 1).to(stored.dtype)
        return self.view(layer)

    def opened(
        self, layer: int, positions: Sequence[int], beyond: int = 0
    ) -> tuple[Tensor, range | tuple[int, ...], Tensor | None]:
        """As `place`, for kernels, which also read what is there; and where entries are kept in 8 bits, if
        they are."""
        return *self.place(layer, positions, beyond), None

    def looked_at(self, layer: int, beyond: int) -> tuple[Tensor, Tensor | None]:
        """A layer's storage for kernels that read it, with slots behind its entries for what is not kept; and
        where entries are kept in 8 bits, if they are."""
        return self.reserve(layer, (), beyond)[0], None

    def place(
        self, layer: int, positions: Sequence[int], beyond: int = 0
    ) -> tuple[Tensor, range | tuple[int, ...]]:
        """As `reserve`, for rising positions that may be among those that are there: later entries make
        room. The index of each."""
        kept = self.positions[layer]
        if not kept or positions[0] > kept[-1]:
            stored, start = self.reserve(layer, positions, beyond)
            return stored, range(start, start + len(positions))
        places = [bisect_left(kept, position) for position in positions]
        stored, used = self.reserve(layer, positions, beyond)
        del kept[used:]
        _make_room(stored, used, places)
        for number, (place, position) in enumerate(zip(places, positions, strict=True)):
            kept.insert(place + number, position)
        return stored, tuple(place + number for number, place in enumerate(places))

    def reserve(self, layer: int, positions: Sequence[int], beyond: int = 0) -> tuple[Tensor, int]:
        """Room for entries that the caller fills at once: all of the layer's storage, and the index
        of the first. `beyond`: slots behind them, for what is not kept."""
        kept, stored = self.positions[layer], self._stored[layer]
        start, end = len(kept), len(kept) + len(positions)
        if end + beyond > stored.shape[1]:
            stored = self._grow(layer, end + beyond)
        kept.extend(positions)
        return stored, start

    def _grow(self, layer: int, size: int) -> Tensor:
        old, used = self._stored[layer], len(self.positions[layer])
        num_heads, capacity, head_dim = old.shape
        capacity = max(FIRST, 2 * capacity)
        while capacity < size:
            capacity *= 2
        grown = old.new_empty(num_heads, capacity, head_dim)
        grown[:, :used] = old[:, :used]
        self._stored[layer] = grown
        return grown

    def give_room(self, room: int) -> None:
        """Storage for so many entries in each layer, as addresses, as `room` when it was made."""
        for layer, old in enumerate(self._stored):
            if old.shape[1] < room and layer not in self.states:
                used = len(self.positions[layer])
                self._stored[layer] = old.new_empty(old.shape[0], room, old.shape[2])
                self._stored[layer][:, :used] = old[:, :used]

    def fit(self) -> None:
        """Let go of storage beyond what is used."""
        for layer in range(len(self._stored)):
            self._stored[layer] = self.entries(layer).clone(memory_format=torch.contiguous_format)

    def copy_from(self, other: KV, length: int) -> None:
        """Become the first `length` positions of another cache of the same model, which has no states."""
        assert not self.states
        self.moved = 0
        for layer, theirs in enumerate(other.positions):
            count = bisect_left(theirs, length)
            self.positions[layer] = theirs[:0]
            stored, _ = self.reserve(layer, theirs[:count])
            stored[:, :count] = other.entries(layer)[:, :count]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Of each layer: key heads, and numbers of a head."""
        return [self._others.get(layer, self._sizes) for layer in range(len(self._stored))]

    @property
    def like(self) -> Tensor:
        """(L, C, 0, E): an empty tensor of the type of blocks, which have all layers' entries."""
        num_heads, _, head_dim = self._stored[0].shape
        return self._stored[0].new_empty(len(self._stored), num_heads, 0, head_dim)

    def blocks(self, start: int, size: int, count: int, move: bool = False) -> list[Tensor]:
        """`count` copies (L, C, size, E) of the entries of `size` positions each, from `start` on, of a cache
        whose layers all have all positions. `move`: nothing else is needed any more, and each layer's memory
        is let go once it is copied."""
        layers, (num_heads, _, head_dim) = len(self._stored), self._stored[0].shape
        shape = layers, num_heads, size, head_dim
        out = [self._stored[0].new_empty(shape) for _ in range(count)]
        for layer, stored in enumerate(self._stored):
            for i, block in enumerate(out):
                at = start + i * size
                block[layer] = stored[:, at : at + size]
            if move:
                self._stored[layer] = stored.new_empty(num_heads, 0, head_dim)
                self.positions[layer] = array("i")
        return out

    def append_block(self, block: Tensor) -> None:
        """The next entries of all layers, copied: what `blocks` gave."""
        self.moved = min(self.moved, self.length)
        for layer, entries in enumerate(block):
            self.append_entries(layer, entries)

    def append_entries(self, layer: int, entries: Tensor) -> None:
        """The next entries (C, S, ...) of one layer, as they are stored, copied."""
        start, size = len(self.positions[layer]), entries.shape[1]
        stored, at = self.reserve(layer, range(start, start + size))
        stored[:, at : at + size] = entries

    def emptied(self) -> KV:
        """Another cache of the same shape, with nothing in it."""
        states = {layer: state.emptied() for layer, state in self.states.items()}
        dtype = self._stored[0].dtype
        return KV(len(self._stored), self._sizes, dtype, states=states, others=self._others)

    def write(self, file: BinaryIO) -> None:
        """All entries into a file, and let their memory go; `read` brings them back, bit by bit."""
        for layer, old in enumerate(self._stored):
            file.write(_bytes(self.entries(layer).contiguous()).data)
            self._stored[layer] = old.new_empty(old.shape[0], 0, old.shape[2])
        for pruned in self.pruned:
            pruned.write(file)
        for state in self.states.values():
            state.write(file)

    def read(self, file: BinaryIO, room: int) -> None:
        """What `write` wrote, into storage for `room` entries a layer."""
        for layer, old in enumerate(self._stored):
            used = len(self.positions[layer])
            size = 0 if layer in self.states else max(room, used)
            self._stored[layer] = old.new_empty(old.shape[0], size, old.shape[2])
            entries = old.new_empty(old.shape[0], used, old.shape[2])
            _fill(entries, file)
            self._stored[layer][:, :used] = entries
        for pruned in self.pruned:
            if (states := pruned.room()) is not None:
                _fill(states, file)
        for state in self.states.values():
            state.read(file)

    def entries(self, layer: int) -> Tensor:
        """(C, S, ...): the entries of a layer as they are stored, no copy."""
        return self._stored[layer][:, : len(self.positions[layer])]

    def view(self, layer: int) -> Tensor:
        """(C, S, E): the entries of a layer as numbers; here no copy."""
        return self.entries(layer)

    def truncate(self, length: int) -> None:
        """Forget every entry at position `length` or later. With states, that must be reachable."""
        self.torn = self.torn and length > 0
        for state in self.states.values():
            state.truncate(length)
        for kept in self.positions:
            if kept and kept[-1] >= length:
                del kept[bisect_left(kept, length) :]
        if self.pruned:
            shorter = [pruned.before(length) for pruned in self.pruned]
            self.pruned = [pruned for pruned in shorter if len(pruned.tokens)]

    def keep(self, layer: int, indices: Sequence[int]) -> None:
        """Of one layer, keep only the entries at these rising indices."""
        kept, stored = self.positions[layer], self.entries(layer)
        stored[:, : len(indices)] = stored[
            :, torch.tensor(indices, dtype=torch.int64, device="cpu")
        ]
        self.positions[layer] = array("i", [kept[i] for i in indices])


def _make_room(stored_CSE: Tensor, used: int, places: Sequence[int]) -> None:
    """Of so many entries, those from each of the rising places on move up by one."""
    end = used
    for shift in range(len(places), 0, -1):
        start = places[shift - 1]
        for stop in range(end, start, -MOVED):
            low = max(start, stop - MOVED)
            stored_CSE[:, low + shift : stop + shift] = stored_CSE[:, low:stop].clone()
        end = start


def _fill(x: Tensor, file: BinaryIO) -> None:
    """With a file's next bytes. Raises ReadError."""
    if file.readinto(_bytes(x).data) != x.nbytes:  # type: ignore[attr-defined]
        raise ReadError("the file that keys and values were put aside in is shorter than it was")


def _bytes(x: Tensor) -> NDArray[np.uint8]:
    """The memory of a contiguous tensor."""
    return x.flatten().view(torch.uint8).numpy()
