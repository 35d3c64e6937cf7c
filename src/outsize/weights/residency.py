"""Where weights live. `Resident`: all of a table in memory, handed to the layers once, at build."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from outsize.encoding.find import encoding
from outsize.native.kernels import Kernels
from outsize.pack.format import Matrix
from outsize.weights.table import Table, Weight, Weights, buffer, view

READERS = 2


def resident(
    table: Table, kernels: Kernels | None, tick: Callable[[int], None]
) -> dict[int, Weights]:
    """Every record of a layer table, by layer. `tick` is told the bytes of each record read."""
    raw, window = buffer(table.header.size)
    stride = table.header.stride

    def read(index: int) -> Weights:
        table.read(index, window[index * stride : (index + 1) * stride])
        tick(stride)
        record = raw[index * stride : (index + 1) * stride]
        return {
            k: tuple(view(record, m, kernels) for m in ms) for k, ms in table.header.tensors.items()
        }

    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(table.header.keys, pool.map(read, range(len(table))), strict=True))


def resident_rows(table: Table, kernels: Kernels | None, tick: Callable[[int], None]) -> Weight:
    """A row table as one matrix: its blocks are joined as they are read."""
    header = table.header
    (matrix,) = next(iter(header.tensors.values()))
    whole = Matrix(matrix.encoding, matrix.num_rows * len(table), matrix.width, 0)
    fields = {k: torch.empty(s.shape, dtype=s.dtype) for k, s in whole.specs.items()}

    def read(index: int) -> None:
        raw, window = buffer(header.stride)
        table.read(index, window)
        _join(fields, view(raw, matrix, kernels), matrix, index)
        tick(header.stride)

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(read, range(len(table))))
    return Weight(encoding(matrix.encoding, kernels), fields, header.num_rows)


def _join(fields: dict[str, Tensor], block: Weight, matrix: Matrix, index: int) -> None:
    for name, spec in matrix.specs.items():
        step = spec.shape[spec.row_axis]
        fields[name].narrow(spec.row_axis, index * step, step).copy_(block.fields[name])
