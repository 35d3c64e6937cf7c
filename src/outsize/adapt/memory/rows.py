"""What the feed-forwards of the embedding give for tokens: computed by the model's own sub-layers.

Shapes: N tokens, V all of them, L layers, D width, R numbers of a layer's basis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from outsize.encoding.find import encoding
from outsize.errors import UnsupportedError
from outsize.kernels.rows import Rows
from outsize.model.ffn.lookup import Computed, MemorySubLayer
from outsize.model.step import Step
from outsize.model.transformer import Transformer
from outsize.pack.kinds.tokens import rows_each
from outsize.pack.tables import TableHeader
from outsize.pack.tensors import Made, Record, TablePlan

TOGETHER = 16  # tokens that run as one step of few rows
KEPT = 64  # rows that are computed before any is written

Bases = Sequence[Tensor] | None  # of each layer (D, R); None: rows are whole


class RowMaker:
    """Rows of the table, in its order."""

    def __init__(self, model: Transformer, tokens: Sequence[int], bases: Bases = None) -> None:
        """`tokens`: those of the rows, in order."""
        self._model, self._tokens, self._bases = model, tokens, bases
        self._layers = [computed(layer.resident) for layer in model.paged_layers[1::2]]
        self._kept: tuple[int, list[Tensor]] = (-1, [])

    @torch.inference_mode()
    def values(self, tokens: Sequence[int]) -> Tensor:
        """(N, L, D) fp32."""
        step, found = Step(Rows([], False), {}, self._model.backend), list[Tensor]()
        for at in range(0, len(tokens), TOGETHER):
            x_TD = self._model.embed(tokens[at : at + TOGETHER])
            found.append(torch.stack([layer.of(x_TD, step) for layer in self._layers], 1).float())
        return torch.cat(found)

    def plan(self, header: TableHeader) -> TablePlan:
        """The table, to be written. Its rows are computed as they are written."""
        records = (self._record(header, number) for number in range(len(header.keys)))
        return TablePlan(header, tuple(records))

    def _record(self, header: TableHeader, number: int) -> Record:
        pieces = [
            Made(m.encoding, m.num_rows, m.width, partial(self._fields, header, number, i))
            for i, m in enumerate(header.tensors["rows"])
        ]
        return {"rows": tuple(pieces)}

    def _fields(self, header: TableHeader, number: int, piece: int) -> Mapping[str, Tensor]:
        """Of one matrix of a record: of all layers, or of the layer of that number."""
        each, matrix = rows_each(header), header.tensors["rows"][piece]
        records = max(1, KEPT // each)
        window = number // records * records * each
        if self._kept[0] != window:
            some = self._tokens[window : window + records * each]
            self._kept = window, self._cut(self.values(some))
        at = number * each - window
        layers = [part[at : at + each] for part in self._kept[1]]
        is_even = len(header.tensors["rows"]) == 1
        rows = torch.stack(layers, 1).flatten(0, 1) if is_even else layers[piece]
        missing = matrix.num_rows - len(rows)  # of the last record
        whole = torch.nn.functional.pad(rows, (0, 0, 0, missing))
        return encoding(matrix.encoding).encode(whole)

    def _cut(self, values_NLD: Tensor) -> list[Tensor]:
        """(N, R) of each layer."""
        layers = values_NLD.unbind(1)
        if self._bases is None:
            return list(layers)
        return [x_ND @ b_DR for x_ND, b_DR in zip(layers, self._bases, strict=True)]

    def with_bases(self, bases: Bases) -> RowMaker:
        """The same, of which bases keep less."""
        return RowMaker(self._model, self._tokens, bases)

    def moments(self, count: int, tick: Callable[[int], None]) -> list[Tensor]:
        """(D, D) fp32 of each layer: the second moment of all tokens' values."""
        found: list[Tensor] = []
        for at in range(0, count, KEPT):
            layers = self.values(range(at, min(count, at + KEPT))).unbind(1)
            found = found or [torch.zeros_like(x_ND.T @ x_ND) for x_ND in layers]
            for sum_DD, x_ND in zip(found, layers, strict=True):
                sum_DD.addmm_(x_ND.T, x_ND)
            tick(min(count, at + KEPT))
        return found


def computed(sublayer: object) -> Computed:
    """A layer's feed-forward of the embedding. Raises UnsupportedError where there is none."""
    if isinstance(sublayer, MemorySubLayer):
        memory = sublayer.memory
        if isinstance(memory, Computed):
            return memory
    raise UnsupportedError("this model's feed-forwards do not read the token's embedding alone")
