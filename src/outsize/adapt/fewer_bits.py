"""`outsize pack --bits`: a pack in palettes of few bits, made from another pack's numbers.

Each matrix of each layer is tried in several sizes, by error feedback on a text. What it costs alone is
measured in the smallest; in others it costs in proportion to the error. A knapsack then spends the budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from outsize.adapt.bits import Option, Stack, choose
from outsize.adapt.calibration import Calibration
from outsize.adapt.change import Change
from outsize.adapt.divergence import divergence, following
from outsize.adapt.palettes import Factor, Rounded, rounded
from outsize.adapt.spill import Spill
from outsize.adapt.statistics import LENGTH, Inputs, States, sequences
from outsize.adapt.trainable import TrainableModel
from outsize.encoding.find import encoding
from outsize.pack.format import Quality
from outsize.pack.tables import Matrix
from outsize.pack.tensors import Made
from outsize.progress import Progress
from outsize.storage.records import Records

PROBED = 3  # bits, up to which it is: errors of more bits are small, and cost in proportion


class Over(Change):
    """Other weights in place of some."""

    def __init__(self, weights: Mapping[Stack, Tensor]) -> None:
        self.weights = weights

    def weight(self, w: Tensor, x: Tensor, layer: int, name: str) -> Tensor:
        return self.weights.get((layer, name), w)


@dataclass(frozen=True, slots=True)
class Tried:
    """One matrix in one size."""

    matrix: Matrix
    error: float  # relative, of its outputs
    kl: float | None = None  # of the model with this alone, where that was measured


class Candidates:
    """Every matrix of the layers in every size, in a file; what each costs; any choice of them, measured."""

    def __init__(self, model: TrainableModel, text: Calibration, records: Records) -> None:
        self.model, self._text, self._records = model, text, records
        self.tried: dict[tuple[int, str, int], Tried] = {}
        ids = sequences(text.held_out, text.start, LENGTH)
        self._states = States(model, ids)
        self._next = following(ids).flatten()
        with torch.inference_mode():
            self._former = self._states.ends()

    def make(self, sizes: tuple[int, ...], spill: Spill, progress: Progress) -> None:
        """All candidates, the smallest first."""
        self._spill, d = spill, self.model.description
        inputs = Inputs(self.model, self._text.tokens, self._text.start)
        probe = States(self.model, sequences(self._text.held_out, self._text.start, LENGTH)[:1])
        for layer in range(d.num_layers):
            progress("fitting layers", layer, d.num_layers)
            for name, moment in inputs.next().items():
                w_NK, factor = self._records.layer(layer, name), Factor(moment)
                for size in sizes:
                    found = rounded(w_NK, factor, size)
                    matrix = Matrix(found.encoding, len(w_NK), w_NK.shape[1], 0)
                    is_probed = size == sizes[0] or size <= PROBED
                    kl = self._alone(probe, (layer, name), matrix, found) if is_probed else None
                    spill.put((layer, name, size), matrix, found.fields)
                    self.tried[layer, name, size] = Tried(matrix, found.error, kl)
            with torch.inference_mode():
                probe.advance()

    @torch.inference_mode()
    def _alone(self, probe: States, stack: Stack, matrix: Matrix, found: Rounded) -> float:
        """KL of the model with one matrix changed."""
        ends = probe.ends(Over({stack: self._decoded(matrix, found.fields)}))
        return divergence(self.model, self._former[:LENGTH], ends, self._next[:LENGTH]).kl

    def _decoded(self, matrix: Matrix, fields: Mapping[str, Tensor]) -> Tensor:
        numbers = encoding(matrix.encoding).decode(fields)[: matrix.num_rows]
        return numbers.to(self.model.dtype)

    def options(self) -> dict[Stack, list[Option]]:
        """What each matrix costs in each size: measured in the smallest, else in proportion to the error."""
        out: dict[Stack, list[Option]] = {}
        for (layer, name, size), tried in self.tried.items():
            first = out.setdefault((layer, name), [])
            if tried.kl is not None:
                rate = max(tried.kl, 0.0) / max(tried.error, 1e-12)
            first.append(Option(size, tried.matrix.size, rate * tried.error))
        return out

    @torch.inference_mode()
    def measure(self, chosen: Mapping[Stack, int]) -> Quality:
        weights = {
            (layer, name): self._decoded(
                self.tried[layer, name, size].matrix, self._spill.get((layer, name, size))
            )
            for (layer, name), size in chosen.items()
        }
        ends = self._states.ends(Over(weights))
        found = divergence(self.model, self._former, ends, self._next)
        return Quality(self.bits(chosen), *found, len(self._next), self._text.text)

    def uniform(self, size: int) -> dict[Stack, int]:
        """All matrices in one size."""
        return {(layer, name): size for layer, name, each in self.tried if each == size}

    def chosen(self, bits: float) -> dict[Stack, int]:
        """The best choice for so many bits a weight."""
        weights = sum(
            self.tried[key].matrix.num_rows * self.tried[key].matrix.width for key in self._first()
        )
        return choose(self.options(), int(bits * weights / 8))

    def _first(self) -> list[tuple[int, str, int]]:
        """Of each matrix one candidate."""
        return list(
            {(layer, name): (layer, name, size) for layer, name, size in self.tried}.values()
        )

    def bits(self, chosen: Mapping[Stack, int]) -> float:
        """Of a weight, everything counted."""
        matrices = [self.tried[layer, name, size].matrix for (layer, name), size in chosen.items()]
        weights = sum(m.num_rows * m.width for m in matrices)
        return 8 * sum(m.size for m in matrices) / weights

    def made(self, chosen: Mapping[Stack, int]) -> dict[Stack, tuple[Made, ...]]:
        """What is to be written."""
        out: dict[Stack, tuple[Made, ...]] = {}
        for (layer, name), size in chosen.items():
            m = self.tried[layer, name, size].matrix
            fields = partial(self._spill.get, (layer, name, size))
            out[layer, name] = (Made(m.encoding, m.num_rows, m.width, fields),)
        return out
