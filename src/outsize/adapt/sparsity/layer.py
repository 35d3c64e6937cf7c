"""One layer's predictor and threshold, from its activations: fitted on most of the text, set on the rest
of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from outsize.adapt.sparsity.rule import Choice, fitted, quantile, runs
from outsize.encoding.find import encoding
from outsize.kernels.backend import Backend
from outsize.model.layers import Linear
from outsize.model.predictors.choose import Rule
from outsize.model.predictors.gate import is_exact
from outsize.model.predictors.predictor import BIAS, Maps, Sample, by_name
from outsize.pack.neuron_file import stored
from outsize.pack.tables import Matrix
from outsize.storage.table import Weight

SET_ASIDE = 4  # one token in so many sets the threshold


@dataclass(frozen=True, slots=True)
class Layer:
    """What the file keeps of a layer, and how well it predicts."""

    matrices: Mapping[str, Matrix]
    tensors: Mapping[str, Tensor]  # as stored
    vectors: Mapping[str, Tensor]
    rule: Rule
    runs: float  # of neighbours that are chosen for a token
    firing_N: Tensor  # how often each bundle is chosen
    missed: float  # share of those worth computing that are not chosen
    kept: float  # share of the energy that is computed

    @property
    def fires(self) -> float:
        return float(self.firing_N.mean())


def fit(
    sample: Sample,
    spec: str,
    about: tuple[str, int],
    gate: Weight,
    choice: Choice,
    backend: Backend,
) -> Layer:
    """`about`: activation, and neurons of a bundle; `gate`: as the pack has it."""
    (activation, bundle), (module, size) = about, by_name(spec)
    aside = len(sample.x_TD) // SET_ASIDE
    used = replace(sample, x_TD=sample.x_TD[:-aside], energy_TN=sample.energy_TN[:-aside])
    made = module.fit(used, size)
    whole: dict[str, Weight] = {}
    for name, (kind, w) in made.matrices.items():
        e = encoding(kind, backend)
        whole[name] = Weight(e, e.encode(w), len(w))
    if not whole:
        whole["gate"] = gate
    exact = is_exact(spec, activation)
    if exact:  # any neuron that is on counts
        made = replace(made, vectors={k: v for k, v in made.vectors.items() if k == BIAS})
    maps = Maps({n: Linear((w,)) for n, w in whole.items()}, made.vectors, activation, bundle)
    x, energy = sample.x_TD[-aside:], sample.energy_TN[-aside:]
    with torch.inference_mode():
        x = x if exact and gate.encoding.name == "fp32" else x.bfloat16()
        scores = torch.cat([module.scores(maps, some) for some in x.split(16)])
    rule = fitted(scores, sample.share, choice, exact, backend)
    chosen = rule.chosen(scores, backend)
    floor = 0.0 if exact else quantile(energy, sample.share)
    due = energy > floor
    missed = float((due & ~chosen).sum() / due.sum().clamp_min(1))
    kept = float((energy * chosen).sum() / energy.sum().clamp_min(1e-30))
    matrices = {n: Matrix(w.encoding.name, w.num_rows, _width(w), 0) for n, w in whole.items()}
    tensors = {
        f"{n}.{f}": t for n, w in whole.items() for f, t in stored(matrices[n], w.fields).items()
    }
    firing = chosen.float().mean(0)
    return Layer(matrices, tensors, made.vectors, rule, runs(chosen), firing, missed, kept)


def _width(w: Weight) -> int:
    return int(w.encoding.decode(w.fields).shape[1])
