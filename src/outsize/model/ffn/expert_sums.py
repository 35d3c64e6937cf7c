"""Sums of experts' outputs, for those who chose them, whoever chose and however they are weighed.

Few rows: experts are computed in the order in which they are in memory, the missing ones arriving
meanwhile; each row's outputs are kept apart and summed in the order of its choices, so that a row's
bits depend neither on that order nor on other rows. Many rows: each expert is fetched once for all of a
prompt, and computed for one chunk after another, so that a chunk's bits are its own.

Shapes: T tokens, D width, K experts used by a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outsize.caching.prefetcher import Scored
from outsize.kernels.structs import ExpertMatrices
from outsize.model.ffn.dense import Biased, Dense
from outsize.model.layers import Linear
from outsize.model.step import Step
from outsize.model_config import Description
from outsize.storage.table import Weights
from outsize.weights.experts import ExpertBank

Chunks = Sequence[tuple[Tensor, Step]]
Expert = Dense | Biased
BIASES = ("gate_up_bias", "down_bias")


@dataclass(frozen=True, slots=True)
class Built:
    """The expert over a slot's views, whatever is in them; `native`: for the kernel that runs several."""

    weights: Weights
    ffn: Expert
    native: ExpertMatrices | None


def native_experts(w: Weights) -> ExpertMatrices | None:
    """None where a matrix is in pieces or in another encoding."""
    found = [w[k][0].coded() if len(w[k]) == 1 else None for k in ("gate_up", "down")]
    gate_up, down = found
    return None if gate_up is None or down is None else ExpertMatrices(gate_up, down)


class ExpertSums:
    """One layer's experts, computed for those who chose them."""

    def __init__(self, d: Description, bank: ExpertBank) -> None:
        assert d.mixture is not None
        self.bank, self._activation, self._used = bank, d.activation, d.mixture.used
        self._weighs_input = d.mixture.weighs_input
        self._built: dict[int, Built] = {}

    def __call__(
        self,
        chunks: Chunks,
        xs: Sequence[Tensor],
        rows: list[list[int]],
        weights: list[list[float]],
        early: Scored,
    ) -> list[Tensor]:
        """(T, D) fp32 for each chunk, of its normed inputs `xs`, and of all rows' experts and weights.
        `early`: what the next layer may ask for."""
        sums = _Sums(chunks, xs, self._used, self._activation, self._weighs_input)
        in_order = any(step.wide for _, step in chunks)
        places = _places(rows, weights)
        for found in self.bank.stream(rows, early, in_order) if places else ():
            sums.add([(self.in_slot(w), places[expert]) for expert, w in found])
        return sums.totals()

    def in_slot(self, w: Weights) -> Built:
        """The expert over a slot's views: the same slot needs no new one, whatever is in it. Biases are
        joined, and so copied, at each use."""
        if "down_bias" in w:
            biases = (torch.cat([b.encoding.decode(b.fields)[0] for b in w[k]]) for k in BIASES)
            return Built(w, Biased(Linear(w["gate_up"]), Linear(w["down"]), *biases), None)
        found = self._built.get(id(w))
        if found is None:
            made = Dense((Linear(w["gate_up"]), Linear(w["down"])), self._activation)
            found = self._built[id(w)] = Built(w, made, native_experts(w))
        return found


Places = list[tuple[int, int, float]]  # row, slot, weight


def _places(rows: Sequence[Sequence[int]], weights: Sequence[Sequence[float]]) -> dict[int, Places]:
    """For each expert, who chose it."""
    out: dict[int, Places] = {}
    for t, (ids, ws) in enumerate(zip(rows, weights, strict=True)):
        for k, (e, w) in enumerate(zip(ids, ws, strict=True)):
            out.setdefault(e, []).append((t, k, w))
    return out


class _Sums:
    """Collects the experts' outputs for all chunks."""

    def __init__(
        self, chunks: Chunks, xs: Sequence[Tensor], used: int, activation: str, weighs_input: bool
    ) -> None:
        self._chunks, self._xs, self._activation = chunks, xs, activation
        self._weighs_input = weighs_input
        self._starts, at = [], 0
        for h, _ in chunks:
            self._starts.append(at)
            at += len(h)
        self._outs = [
            torch.zeros_like(h) if step.wide else h.new_zeros(len(h), used, h.shape[1])
            for h, step in chunks
        ]

    def add(self, experts: Sequence[tuple[Built, Places]]) -> None:
        """Compute some experts for those who chose them."""
        for (h, step), x, start, out in zip(
            self._chunks, self._xs, self._starts, self._outs, strict=True
        ):
            rows = range(start, start + len(h))
            mine = [(e, [(t - start, k, w) for t, k, w in p if t in rows]) for e, p in experts]
            mine = [(e, p) for e, p in mine if p]
            native, theirs = [e.native for e, _ in mine], [p for _, p in mine]
            if self._weighs_input:
                for e, places in mine:
                    add_weighed(e.ffn, places, x, step, out)
                continue
            if step.backend.experts(native, theirs, x, out, self._activation):
                continue
            for e, places in mine:
                add(e.ffn, places, x, step, out)

    def totals(self) -> list[Tensor]:
        """(T, D) of each chunk."""
        return [
            out if step.wide else _in_order(out)
            for (_, step), out in zip(self._chunks, self._outs, strict=True)
        ]


def _in_order(out_TKD: Tensor) -> Tensor:
    """(T, D): each row's outputs, summed in the order of its choices."""
    total = out_TKD[:, 0].clone()
    for k in range(1, out_TKD.shape[1]):
        total += out_TKD[:, k]
    return total


def add(ffn: Expert, places: Places, x_TD: Tensor, step: Step, out: Tensor) -> None:
    """One expert, the plain way."""
    rows, slots, weights = _columns(places)
    _put(ffn(x_TD[rows], step).float() * weights[:, None], rows, slots, step, out)


def add_weighed(ffn: Expert, places: Places, x_TD: Tensor, step: Step, out: Tensor) -> None:
    """One expert whose inputs are weighed."""
    rows, slots, weights = _columns(places)
    x = (x_TD[rows].float() * weights[:, None]).to(x_TD.dtype)
    _put(ffn(x, step).float(), rows, slots, step, out)


def _columns(places: Places) -> tuple[Tensor, Tensor, Tensor]:
    columns = zip(*places, strict=True)
    rows, slots = (torch.tensor(next(columns), dtype=torch.int64, device="cpu") for _ in range(2))
    return rows, slots, torch.tensor(next(columns), dtype=torch.float32, device="cpu")


def _put(y: Tensor, rows: Tensor, slots: Tensor, step: Step, out: Tensor) -> None:
    if step.wide:
        out.index_add_(0, rows, y)
    else:
        out[rows, slots] = y
