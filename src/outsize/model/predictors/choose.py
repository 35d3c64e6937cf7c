"""Chooses a layer's bundles for each row, from an add-on file (pack/neuron_file.py): those whose scores are
above the layer's threshold, or, since neighbours are one read, chunks of them: those that bring most for
what reading them costs (kernels/chunks.py). Either depends on the row's scores and on the file alone, never
on what is in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from outsize.encoding.find import encoding
from outsize.errors import AdapterError
from outsize.kernels.backend import Backend
from outsize.model.layers import Linear
from outsize.model.predictors.gate import is_exact
from outsize.model.predictors.predictor import BIAS, IMPORTANCE, Maps, by_name, row_by_row
from outsize.model_config import Description
from outsize.pack.neuron_file import CHUNKS, GAPS, MOST_GAP, THRESHOLDS, NeuronFile
from outsize.storage.table import Weight


@dataclass(frozen=True, slots=True)
class Rule:
    """Of a layer: what a bundle's score must be above, which is the price of reading it; and what each run of
    neighbours costs beside, in scores (None: nothing, and each bundle is chosen by itself). `exact`: all
    above the threshold are chosen whatever they cost; then the gap is in bundles that are read along."""

    threshold: float
    gap: float | None = None
    exact: bool = False

    def chosen(self, scores_TN: Tensor, backend: Backend) -> Tensor:
        """(T, N)."""
        if self.gap is None:
            return scores_TN > self.threshold
        value_TN = scores_TN - self.threshold
        if self.exact:
            value_TN = torch.where(value_TN > 0, self.gap + 1, -1.0).to(value_TN.dtype)
        return backend.chunks(value_TN.contiguous(), self.gap)


class Chooser:
    """Which bundles of a layer to compute, for each row by itself."""

    def __init__(self, spec: str, maps: Maps, rule: Rule, backend: Backend) -> None:
        module, _ = by_name(spec)
        self._scores, self._maps, self._rule, self._backend = module.scores, maps, rule, backend
        self._dtype = None if rule.exact else torch.bfloat16

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(T, N) is it chosen?, and its score."""
        x = x_TD if self._dtype is None else x_TD.to(self._dtype)
        scores_TN = row_by_row(self._maps, self._scores, x)
        return self._rule.chosen(scores_TN, self._backend), scores_TN


def choosers(file: NeuronFile, d: Description, backend: Backend) -> list[Chooser]:
    """One a layer. Raises AdapterError for a file that does not fit, UnsupportedError for an unknown
    predictor."""
    rules, about = _rules(file), file.about
    is_odd = any(r.threshold or (r.gap or 0.0) > MOST_GAP for r in rules)
    if about.exact and (is_odd or not is_exact(about.predictor, d.activation)):
        raise AdapterError(
            f"{file.path} says that it misses nothing, which its predictor, {about.predictor}, and "
            "thresholds do not bear out; make it again with `outsize adapt sparsity`"
        )
    if about.bundle * about.count != d.ffn_width:
        raise AdapterError(
            f"{file.path} is of {about.bundle * about.count:,} neurons a layer, this model has "
            f"{d.ffn_width:,}; make one with `outsize adapt sparsity`"
        )
    out = []
    for layer in range(d.num_layers):
        maps = Maps(
            _matrices(file, layer, backend), _vectors(file, layer), d.activation, about.bundle
        )
        _check(file, maps, layer, d)
        out.append(Chooser(about.predictor, maps, rules[layer], backend))
    return out


def _rules(file: NeuronFile) -> list[Rule]:
    """By layer. Raises AdapterError."""
    thresholds, exact = file.numbers(THRESHOLDS).tolist(), file.about.exact
    if file.about.choose != CHUNKS:
        return [Rule(t, None, exact) for t in thresholds]
    gaps = file.numbers(GAPS).tolist()
    if min(gaps) < 0:
        raise AdapterError(
            f"{file.path}: a read costs {min(gaps)} in one of its layers, less than nothing; make it again "
            "with `outsize adapt sparsity`"
        )
    return [Rule(t, gap, exact) for t, gap in zip(thresholds, gaps, strict=True)]


def _matrices(file: NeuronFile, layer: int, backend: Backend) -> dict[str, Linear]:
    return {
        name: Linear((Weight(encoding(m.encoding, backend), fields, m.num_rows),))
        for name, m, fields in file.layer(layer)
    }


def _vectors(file: NeuronFile, layer: int) -> dict[str, Tensor]:
    prefix = f"{layer}."
    names = [n for n in file.about.vectors if n.startswith(prefix)]
    return {n.removeprefix(prefix): file.numbers(n) for n in names}


def _check(file: NeuronFile, maps: Maps, layer: int, d: Description) -> None:
    """Do the layer's matrices make a score for each bundle?"""
    about, names = file.about, {"gate": ("gate",), "svd": ("a", "b"), "trained": ("a", "b")}
    kind = about.predictor.partition(":")[0]
    found: Mapping[str, tuple[int, int]] = {
        n.partition(".")[2]: (m.num_rows, m.width)
        for n, m in about.matrices.items()
        if n.startswith(f"{layer}.")
    }
    rows = about.count if kind == "trained" else d.ffn_width
    last = names.get(kind, ())[-1:]
    is_right = set(found) == set(names.get(kind, ())) and bool(last) and found[last[0]][0] == rows
    if is_right and len(found) == 2:
        is_right = found["a"][1] == d.width and found["b"][1] == found["a"][0]
    elif is_right:
        is_right = found["gate"][1] == d.width
    known = {BIAS} if about.exact else {IMPORTANCE, BIAS}
    lengths = {len(v) for v in maps.vectors.values()} | {d.ffn_width}
    if not is_right or len(lengths) > 1 or not set(maps.vectors) <= known:
        raise AdapterError(
            f"{file.path}: the {about.predictor} predictor of layer {layer} does not fit this model; make it "
            "again with `outsize adapt sparsity`"
        )
