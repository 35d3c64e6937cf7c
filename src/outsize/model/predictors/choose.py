"""Chooses a layer's bundles for each row: the predictor's scores against the layer's threshold, from an
add-on file (pack/neuron_file.py)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from outsize.encoding.find import encoding
from outsize.errors import AdapterError
from outsize.kernels.backend import Backend
from outsize.model.layers import Linear
from outsize.model.predictors.predictor import BIAS, IMPORTANCE, Maps, by_name, row_by_row
from outsize.model_config import Description
from outsize.pack.neuron_file import THRESHOLDS, NeuronFile
from outsize.storage.table import Weight


class Chooser:
    """Which bundles of a layer to compute, for each row by itself."""

    def __init__(self, spec: str, maps: Maps, threshold: float, is_exact: bool) -> None:
        module, _ = by_name(spec)
        self._scores, self._maps, self._threshold = module.scores, maps, threshold
        self._dtype = None if is_exact else torch.bfloat16

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(T, N) is it chosen?, and its score."""
        x = x_TD if self._dtype is None else x_TD.to(self._dtype)
        scores_TN = row_by_row(self._maps, self._scores, x)
        return scores_TN > self._threshold, scores_TN


def choosers(file: NeuronFile, d: Description, backend: Backend) -> list[Chooser]:
    """One a layer. Raises AdapterError for a file that does not fit, UnsupportedError for an unknown
    predictor."""
    thresholds, about = file.numbers(THRESHOLDS).tolist(), file.about
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
        out.append(Chooser(about.predictor, maps, thresholds[layer], about.exact))
    return out


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
    lengths = {len(v) for v in maps.vectors.values()} | {d.ffn_width}
    if not is_right or len(lengths) > 1 or not set(maps.vectors) <= {IMPORTANCE, BIAS}:
        raise AdapterError(
            f"{file.path}: the {about.predictor} predictor of layer {layer} does not fit this model; make it "
            "again with `outsize adapt sparsity`"
        )
