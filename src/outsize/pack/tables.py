"""The tables of a pack: files of equally long records, and where each matrix lies in a record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from outsize.encoding.find import encoding
from outsize.encoding.plain import FieldSpec

PAGE = 4096
ALIGN = 64


@dataclass(frozen=True, slots=True)
class Matrix:
    """One encoded matrix inside a record; a tensor is one or several, stacked along its rows."""

    encoding: str
    num_rows: int
    width: int
    offset: int  # of its first field, from the record's start

    @property
    def specs(self) -> dict[str, FieldSpec]:
        return encoding(self.encoding).specs(self.num_rows, self.width)

    def offsets(self) -> dict[str, int]:
        """Where each field starts in the record."""
        out, at = {}, self.offset
        for name, spec in self.specs.items():
            out[name] = at
            at += aligned(field_bytes(spec), ALIGN)
        return out

    @property
    def size(self) -> int:
        return sum(aligned(field_bytes(spec), ALIGN) for spec in self.specs.values())


@dataclass(frozen=True, slots=True)
class TableHeader:
    """One record file."""

    name: str
    kind: str  # "layers", "experts", "rows" or "tokens": a file of pack/kinds/
    keys: tuple[int, ...]  # layer numbers; layer * experts + expert; or first rows
    stride: int
    tensors: Mapping[str, tuple[Matrix, ...]]
    checksums: tuple[int, ...]
    num_rows: int = 0  # of the whole matrix, for "rows" and "tokens"

    @property
    def file(self) -> str:
        return f"{self.name}.records"

    @property
    def size(self) -> int:
        return self.stride * len(self.keys)


def aligned(size: int, step: int) -> int:
    return -(-size // step) * step


def field_bytes(spec: FieldSpec) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize
