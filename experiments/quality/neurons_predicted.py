"""What leaving out neurons costs where a predictor chooses them: perplexity of held-out text, and bytes a
token, for five shares and three predictors.

    python -m experiments.quality.neurons_predicted MODEL TEXT TOKENS NAME ORDER >>
    experiments/results/epyc-2core/neurons-predicted.jsonl

ORDER: natural (bundles of 32 neighbours), or use (of few, in the order of their mean contribution). Each
predictor is fitted once (`trained` to the middle share), on three quarters of TOKENS; a quarter of those sets
the thresholds; perplexity is of two other sequences. Bytes: of the bundles of a token if none are in memory,
with their padding."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from experiments.quality.neurons import CPU, perplexity
from outsize.adapt.change import AS_IS, Change
from outsize.adapt.sparsity.layer import SET_ASIDE
from outsize.adapt.sparsity.measure import by_use, samples
from outsize.adapt.sparsity.words import words
from outsize.adapt.trainable import TrainableModel, matmul_type
from outsize.encoding.find import encoding
from outsize.kernels.backend import Backend
from outsize.model.layers import Linear
from outsize.model.predictors.predictor import Maps, Sample, by_name
from outsize.options import LoadOptions
from outsize.pack import fetch
from outsize.plan.decide import compiled
from outsize.progress import silent
from outsize.storage.table import Weight
from outsize.weights.bundles import NATURAL, bundles_of

PREDICTORS = "svd:64", "trained:64", "gate:4"
SHARES = 0.5, 0.6, 0.7, 0.8, 0.9
MIDDLE, AT_ONCE, MOST = 0.7, 16, 1 << 20


@dataclass(frozen=True, slots=True)
class Fitted:
    """A layer's predictor; by share, its threshold and the share of worthy bundles that it misses."""

    spec: str
    maps: Maps
    at: dict[float, tuple[float, float]]

    def scores(self, x_TD: Tensor) -> Tensor:
        module, _ = by_name(self.spec)
        rows = x_TD.bfloat16().split(AT_ONCE)
        return torch.cat([module.scores(self.maps, some) for some in rows])


def quantile(x: Tensor, share: float) -> float:
    flat = x.flatten().float()
    return float(torch.quantile(flat[:: -(-len(flat) // MOST)], 1 - share))


@torch.inference_mode()
def fitted(sample: Sample, spec: str, about: tuple[str, int], backend: Backend) -> Fitted:
    module, size = by_name(spec)
    aside = len(sample.x_TD) // SET_ASIDE
    used = replace(sample, x_TD=sample.x_TD[:-aside], energy_TN=sample.energy_TN[:-aside])
    made, matrices = module.fit(used, size), dict[str, Linear]()
    for name, (kind, w) in made.matrices.items():
        e = encoding(kind, backend)
        matrices[name] = Linear((Weight(e, e.encode(w), len(w)),))
    out = Fitted(spec, Maps(matrices, made.vectors, *about), {})
    scores, energy = out.scores(sample.x_TD[-aside:]), sample.energy_TN[-aside:]
    for share in SHARES:
        threshold, floor = quantile(scores, share), quantile(energy, share)
        missed = ((energy > floor) & (scores <= threshold)).sum() / (energy > floor).sum()
        out.at[share] = threshold, float(missed)
    return out


class Chosen(Change):
    """Zeros for the bundles that a predictor does not choose. `fires`: by layer, the share that it does."""

    def __init__(self, layers: list[Fitted], share: float, order_LF: Tensor | None) -> None:
        self._layers, self._share, self._order = layers, share, order_LF
        self.fires: dict[int, float] = {}

    def weight(self, w: Tensor, x: Tensor, layer: int, name: str) -> Tensor:
        if name == "gate_up":
            found = self._layers[layer]
            self._chosen = found.scores(x.flatten(0, 1)) > found.at[self._share][0]
            self.fires[layer] = float(self._chosen.float().mean())
        elif name == "down":
            kept = self._chosen.repeat_interleave(w.shape[1] // self._chosen.shape[1], 1)
            if self._order is not None:
                back = torch.empty_like(self._order[layer])
                back[self._order[layer]] = torch.arange(len(back))
                kept = kept[:, back]
            x.mul_(kept.view_as(x))  # what down is given, in place
        return w


def rows(name: str, text: str, tokens: int, order: str) -> Iterator[dict[str, object]]:
    pack, native = fetch.pack(name, quiet=True), compiled(LoadOptions(quiet=True))
    found = words(pack, [Path(text)], tokens)
    model, d = TrainableModel(pack, CPU, matmul_type(CPU), silent), pack.description
    order_LF = by_use(model, found.ids_BT[:4]) if order == "use" else None
    bundles = bundles_of(pack, None, NATURAL if order_LF is None else order)
    layers: dict[str, list[Fitted]] = {spec: [] for spec in PREDICTORS}
    for sample in samples(model, found.ids_BT, bundles.bundle, MIDDLE, order_LF):
        for spec, made in layers.items():
            made.append(fitted(sample, spec, (d.activation, bundles.bundle), native))
    held_out = found.held_out_BT[:2]
    dense = perplexity(model, held_out, AS_IS)
    sizes = {i: t.form.count * t.form.stride for t in bundles.tables for i in t.layers}
    for spec, made in layers.items():
        for share in SHARES:
            change = Chosen(made, share, order_LF)
            after = perplexity(model, held_out, change)
            missed = [layer.at[share][1] for layer in made]
            yield {
                "predictor": spec, "order": order, "bundle": bundles.bundle, "share": share,
                "fires": sum(change.fires.values()) / len(made), "missed": sum(missed) / len(made),
                "mb": sum(sizes[i] * f for i, f in change.fires.items()) / 1e6,
                "dense_mb": sum(t.dense.size for t in bundles.tables) / 1e6,
                "tokens": held_out.numel() - len(held_out), "dense": dense, "perplexity": after,
            }  # fmt: skip


def main(name: str, text: str, tokens: str, said: str, order: str) -> None:
    began = time.process_time()
    for row in rows(name, text, int(tokens), order):
        told = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        spent = {"processor_s": round(time.process_time() - began, 1)}
        print(json.dumps({"model": said} | told | spent), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
