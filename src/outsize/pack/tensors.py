"""What is written into a record: a checkpoint's tensors under our names, found, checked, stacked, and how
their rows are reordered; or fields that are made from another pack's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch

from outsize.checkpoint.checkpoint import Checkpoint, Tensor, refuse_unreadable, rows_of
from outsize.encoding.find import encoding_for
from outsize.errors import CheckpointError
from outsize.family.recipe import Recipe
from outsize.pack.records import CONTEXT, FIXED, FLOATS, HALF, HALVES, POSITIONS, Specs, TensorSpec
from outsize.pack.tables import TableHeader
from outsize.pack.unused import missing

LOSSY = ("Q2_K", "Q3_K")
EXPERT_SCALE = "expert_scale"
FLAT = ("delta_conv", "conv_taps")  # vectors that a checkpoint keeps in another shape
HALVED = tuple(f"{n}{part}" for n in "qk" for part in ("", "_bias", "_norm"))


@dataclass(frozen=True, slots=True)
class Part:
    """One checkpoint tensor that goes into a matrix, and how its rows must be reordered."""

    tensor: Tensor
    head_dim: int = 0  # > 0: heads in halves, to be interleaved
    rotated: int = 0  # how many of a head's rows are so; 0: all
    shift: float = 0.0  # added to every number
    transposed: bool = False
    first: int = 0  # of its rows (of a vector: its numbers), every `step`th from this one on
    step: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, width) of what it gives; a vector is one row."""
        shape = self.tensor.shape
        if len(shape) == 1:
            return 1, len(range(self.first, shape[0], self.step))
        rows, width = shape[::-1] if self.transposed else shape
        return len(range(self.first, rows, self.step)), width


@dataclass(frozen=True, slots=True)
class Piece:
    """A matrix to be written, and what it is made of, stacked along rows."""

    encoding: str
    parts: tuple[Part, ...]

    @property
    def num_rows(self) -> int:
        return sum(part.shape[0] for part in self.parts)

    @property
    def width(self) -> int:
        return self.parts[0].shape[1]


@dataclass(frozen=True, slots=True)
class Made:
    """A matrix to be written whose fields are no checkpoint's: another pack's, or made from its numbers."""

    encoding: str
    num_rows: int
    width: int
    fields: Callable[[], Mapping[str, torch.Tensor]]
    parts: tuple[Part, ...] = ()


Record = dict[str, tuple[Piece | Made, ...]]


@dataclass(frozen=True, slots=True)
class TablePlan:
    """A table to be written: its header without checksums, and each record's contents."""

    header: TableHeader
    records: Sequence[Record]
    linked: Path | None = None  # a file that holds just this, with the header's checksums


class SourceTensors:
    """Finds and checks every tensor that a recipe names. `wanted`: an encoding, or "auto"; `grouped`: do
    our kernels for grouped encodings run here?"""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, wanted: str, grouped: bool) -> None:
        self.all, self.recipe = checkpoint.tensors, recipe
        self.wanted, self.grouped = wanted, grouped
        self.description = recipe.description
        self.used: set[str] = set()  # the checkpoint's names of those that were found

    def source_name(self, name: str, layer: int) -> str:
        """What the checkpoint calls a tensor of a layer."""
        return self.recipe.names[name].replace("{i}", str(layer))

    def find(
        self, name: str, layer: int, shape: tuple[int, ...], expert: int | None = None
    ) -> Tensor:
        """One tensor of a layer; of an expert, by its own name or out of the stack of all. Raises
        CheckpointError, UnsupportedError."""
        source = self.source_name(name, layer)
        if name in self.recipe.instead.get(layer, ()):
            source = self.source_name(self.recipe.instead[layer][name], layer)
        if expert is not None and "{e}" in source:
            source = source.replace("{e}", str(expert))
        elif expert is not None:
            assert self.description.mixture is not None
            return _unstack(
                self.find(name, layer, (self.description.mixture.count, *shape)), expert
            )
        found = self.all.get(source)
        if (
            name == EXPERT_SCALE and found is None
        ):  # of a GGUF, which reads it as the stack's factor
            found = self._factor(layer)
        if found is None:
            raise missing(source, self.all, self.recipe)
        self.used.add(source)
        if name == "expert_down" and EXPERT_SCALE in self.recipe.names:
            found = replace(found, factor=None)  # which routing heeds
        is_flat = name in FLAT and math.prod(found.shape) == shape[0]
        if is_flat or (found.shape in ((1, *shape), (*shape, 1)) and len(shape) == 1):
            found = replace(found, shape=shape)
        if found.shape != shape:
            raise CheckpointError(f"tensor {source!r} has shape {found.shape}, not {shape}")
        refuse_unreadable(found)
        return found

    def _factor(self, layer: int) -> Tensor | None:
        """Of each expert of a layer, where a checkpoint has it with the experts."""
        stack = self.all.get(self.source_name("expert_down", layer))
        return None if stack is None else stack.factor

    def encoding(self, tensor: Tensor, wanted: str | None = None) -> str:
        """The encoding that a matrix is packed in."""
        wanted = wanted or self.wanted
        return encoding_for(tensor.kind.name, tensor.shape[-1], wanted, self.grouped)

    def record(self, layer: int, specs: Specs, expert: int | None = None) -> Record:
        """All that a record is made of."""
        return {name: self._pieces(name, spec, layer, expert) for name, spec in specs.items()}

    def _pieces(
        self, name: str, spec: TensorSpec, layer: int, expert: int | None
    ) -> tuple[Piece, ...]:
        """The parts of a tensor; of a matrix, those of one encoding as one."""
        if name in HALVES:
            return (self._by_head(name, spec, layer),)
        pieces: list[Piece] = []
        found = self._fused(name, spec, layer) if expert is None else None
        for number, (part, rows) in enumerate(spec.parts):
            unused = self.recipe.unused_positions if part == POSITIONS else 0
            shape = (rows + unused, spec.width) if spec.width else (rows,)
            if part == CONTEXT:
                whole = self.find(part, layer, (self.description.num_layers * rows, spec.width))
                tensors = [rows_of(whole, layer * rows, (layer + 1) * rows)]
            elif part in self.recipe.strips:
                tensors = self._strips(part, layer, shape)
            else:
                tensors = [
                    self.find(part, layer, shape, expert) if found is None else found[number]
                ]
            encoding = self._encoding(name, spec, tensors[0])
            made = tuple(self._part(part, tensor, layer, unused) for tensor in tensors)
            if pieces and spec.width and pieces[-1].encoding == encoding:
                pieces[-1] = Piece(encoding, (*pieces[-1].parts, *made))
            else:
                pieces.append(Piece(encoding, made))
        return tuple(pieces)

    def _encoding(self, name: str, spec: TensorSpec, tensor: Tensor) -> str:
        return FLOATS if name in FIXED or not spec.width else self.encoding(tensor)

    def _by_head(self, name: str, spec: TensorSpec, layer: int) -> Piece:
        """A map of latent attention: stacked by head, keys' turned (GGUF), or both maps below each other in
        each head, keys' not turned."""
        d, kind = self.description, FLOATS if self.wanted == FLOATS else HALF
        assert d.latent is not None
        if name in self.recipe.names:
            stack = self.find(name, layer, (d.num_heads, spec.rows // d.num_heads, spec.width))
            return Piece(kind, (Part(replace(stack, shape=(spec.rows, spec.width))),))
        key, value, is_key = d.latent.key, d.latent.value, name == "k_b"
        both = self.find("kv_b", layer, (d.num_heads * (key + value), d.latent.rank))
        starts = range(0 if is_key else key, both.shape[0], key + value)
        size = key if is_key else value
        parts = (Part(rows_of(both, i, i + size), transposed=is_key) for i in starts)
        return Piece(kind, tuple(parts))

    def _strips(self, name: str, layer: int, shape: tuple[int, ...]) -> list[Tensor]:
        """A matrix whose rows lie among others' in a checkpoint's tensor."""
        strip = self.recipe.strips[name]
        rows = shape[0] // strip.size * strip.every
        whole = self.find(strip.whole, layer, (rows, *shape[1:]))
        starts = range(strip.first, rows, strip.every)
        return [rows_of(whole, start, start + strip.size) for start in starts]

    def _fused(self, name: str, spec: TensorSpec, layer: int) -> list[Tensor] | None:
        """The parts of a tensor that a checkpoint keeps as one, under our name of the whole."""
        if len(spec.parts) == 1 or name not in self.recipe.names:
            return None
        whole = self.find(name, layer, (spec.rows, spec.width))
        ends = list(accumulate(rows for _, rows in spec.parts))
        return [rows_of(whole, a, b) for a, b in zip([0, *ends], ends, strict=False)]

    def _part(self, name: str, tensor: Tensor, layer: int = 0, first: int = 0) -> Part:
        """Query and key rows, their biases and norms rotate in adjacent pairs in a pack. `first`: of its
        rows that is used."""
        shift = self.recipe.norm_shift if name.endswith("norm") else 0.0
        d = self.description.of_layer(layer)
        halves = name in HALVED and d.latent is None and not self.recipe.interleaved
        rotated = next((r.rotated for r in d.ropes if r.rotated), 0) or 0
        head_dim, rotated = (d.head_dim, rotated) if halves else (0, 0)
        return Part(tensor, head_dim, rotated, shift, first=first)


def _unstack(stack: Tensor, index: int) -> Tensor:
    """One of the equal tensors that a stacked one is made of."""
    size = stack.size // stack.shape[0]
    name, offset = f"{stack.name}[{index}]", stack.offset + index * size
    scales, factor = (
        None if of is None else _unstack(of, index) for of in (stack.scales, stack.factor)
    )
    shape = stack.shape[1:]
    return Tensor(name, stack.kind, shape, stack.path, offset, size, scales, factor)
