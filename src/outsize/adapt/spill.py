"""Encoded matrices in a file, until it is known which of them a pack will hold."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from outsize.errors import DiskFullError
from outsize.kernels.plain import PLAIN
from outsize.pack.tables import Matrix
from outsize.storage.table import view


class Spill:
    """One behind the other; what was put can be read at any time."""

    def __init__(self, path: Path) -> None:
        self._path, self._end = path, 0
        self._places: dict[Hashable, tuple[int, Matrix]] = {}
        path.touch()

    def put(self, key: Hashable, matrix: Matrix, fields: Mapping[str, Tensor]) -> None:
        """`matrix`: its encoding and shape. Raises DiskFullError."""
        raw = bytearray(matrix.size)
        for name, at in matrix.offsets().items():
            part = fields[name].contiguous().view(torch.uint8).numpy().tobytes()
            raw[at : at + len(part)] = part
        try:
            with self._path.open("ab") as file:
                file.write(raw)
        except OSError as e:
            raise DiskFullError(
                f"candidates cannot be kept in {self._path.parent} ({self._end / 1e6:,.0f} MB are): "
                f"{e.strerror or e}; make room, or set OUTSIZE_HOME to another disk"
            ) from None
        self._places[key] = self._end, matrix
        self._end += len(raw)

    def get(self, key: Hashable) -> Mapping[str, Tensor]:
        """The fields."""
        start, matrix = self._places[key]
        with self._path.open("rb") as file:
            file.seek(start)
            raw = torch.frombuffer(bytearray(file.read(matrix.size)), dtype=torch.uint8)
        return view(raw, matrix, PLAIN).fields
