"""All records of a pack, one at a time, for what makes another pack of it."""

from __future__ import annotations

from types import TracebackType

import torch

from outsize.kernels.plain import PLAIN
from outsize.pack.format import Pack
from outsize.pack.tables import TableHeader
from outsize.storage.stats import IOStats
from outsize.storage.table import Table, Weight, Weights, views


class Records:
    """A pack's tables, open. The last record that was read is kept."""

    def __init__(self, pack: Pack) -> None:
        stats = IOStats()
        self._tables = {t.name: Table(pack.path, t, stats) for t in pack.tables}
        self._last: tuple[str, int] | None = None
        self._weights: Weights = {}

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        for table in self._tables.values():
            table.close()

    def read(self, header: TableHeader, number: int) -> Weights:
        """One record's tensors. Raises PackError, ReadError."""
        if self._last != (header.name, number):
            raw = torch.empty(header.stride, dtype=torch.uint8, device="cpu")
            self._tables[header.name].read(number, memoryview(raw.numpy()))  # type: ignore[arg-type]
            self._last, self._weights = (header.name, number), views(raw, header, PLAIN)
        return self._weights

    def weights(self, layer: int, tensor: str) -> tuple[Weight, ...]:
        """One of a layer's tensors, as it is stored."""
        for table in self._tables.values():
            header = table.header
            if header.kind == "layers" and tensor in header.tensors and layer in header.keys:
                return self.read(header, header.keys.index(layer))[tensor]
        raise KeyError(tensor)

    def layer(self, layer: int, tensor: str) -> torch.Tensor:
        """(N, K) fp32: one of a layer's matrices, decoded."""
        pieces = self.weights(layer, tensor)
        return torch.cat([w.encoding.decode(w.fields)[: w.num_rows] for w in pieces])
