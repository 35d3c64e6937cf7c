"""Ways of choosing how much of each feed-forward a token gets, all of one mean share: by routers; by labels
(an oracle, which knows each width's error); by chance, with the routers' shares in each layer; the same in
all layers for all tokens ("static"); by layer, the same for all tokens ("layers": the narrowest width whose
mean error is small enough); and with whole feed-forwards left out ("skip").

Shapes: B sequences, T tokens, L layers, M widths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from outsize.adapt.nested.correct import closed_form
from outsize.adapt.nested.prefixes import Choose, Ffn, Prefixes, ffns, labels
from outsize.adapt.nested.refit import refitted
from outsize.adapt.statistics import bf16_products, causal
from outsize.adapt.trainable import TrainableModel, matmul_type
from outsize.model.width import chosen
from outsize.pack import fetch, nested_file
from outsize.pack.format import Pack
from outsize.pack.nested_file import BIAS, ROUTER, A, B, C
from outsize.progress import silent

CPU = torch.device("cpu")
ENDS = 2  # first and last layers that are not skipped
GOLDEN = 0.6180339887498949
BISECTIONS = 6


class Way(NamedTuple):
    """A way of choosing, and the layers that are left out."""

    choose: Choose
    skipped: frozenset[int] = frozenset()


class Skipping(Prefixes):
    """As `Prefixes`, without some feed-forwards."""

    skipped: frozenset[int] = frozenset()

    def ffn(self, x: Tensor, h: Tensor, layer: int, whole: Callable[[], Tensor]) -> Tensor:
        out = super().ffn(x, h, layer, whole)
        return out * 0 if layer in self.skipped else out


class Plain:
    """Feed-forwards in the order of their neurons, and ways that need no routers. `ends`: neurons of each
    width, of so many `pieces`."""

    def __init__(
        self, model: TrainableModel, ffns: Sequence[Ffn], ends: list[int], pieces: Sequence[int]
    ) -> None:
        self.model, self.ffns, self.ends = model, list(ffns), ends
        self.widths_M = torch.tensor(pieces).float() / pieces[-1]
        self.layers = model.description.num_layers
        self.fixes: dict[str, Tensor] | None = None

    @torch.no_grad()
    def run(self, ids: Tensor, way: Way) -> Prefixes:
        seen = Skipping(self.model, self.ffns, self.ends, way.choose, self.fixes)
        seen.skipped = way.skipped
        with bf16_products():
            seen.states, _ = self.model.run(causal(self.model.embed(ids)), change=seen)
        return seen

    def share(self, seen: Prefixes, way: Way) -> float:
        """Of the feed-forwards, that was executed."""
        used = [float(self.widths_M[w].mean()) for w in seen.chosen]
        return sum(u for i, u in enumerate(used) if i not in way.skipped) / self.layers

    def whole(self) -> Way:
        last = len(self.widths_M) - 1
        return Way(lambda layer, x, error: torch.full(x.shape[:-1], last))

    def oracle(self, level: float) -> Way:
        return Way(lambda layer, x, error: labels(error, level))

    def by_layer(self, level: float) -> Way:
        def choose(layer: int, x: Tensor, error: Tensor) -> Tensor:
            return labels(error.flatten(0, -2).mean(0).expand_as(error), level)

        return Way(choose)

    def shuffled(self, like: Prefixes, seed: int) -> Way:
        """Each layer's widths as they were, of other tokens."""
        generator = torch.Generator().manual_seed(seed)

        def choose(layer: int, x: Tensor, error: Tensor) -> Tensor:
            flat = like.chosen[layer].flatten()
            return flat[torch.randperm(len(flat), generator=generator)].view(x.shape[:-1])

        return Way(choose)

    def static(self, share: float) -> Way:
        """One width for all tokens of a layer: of two neighbours, the wider in as many layers as it takes."""
        below = int((self.widths_M <= share + 1e-6).sum()) - 1
        above = min(below + 1, len(self.widths_M) - 1)
        step = float(self.widths_M[above] - self.widths_M[below])
        part = (share - float(self.widths_M[below])) / step if step else 0.0
        order = sorted(range(self.layers), key=lambda i: i * GOLDEN % 1)
        wide = set(order[: round(part * self.layers)])
        return Way(
            lambda layer, x, error: torch.full(x.shape[:-1], above if layer in wide else below)
        )

    def skipped(self, share: float) -> Way:
        """Layers whose feed-forwards are left out, spread over the middle."""
        order = sorted(range(ENDS, self.layers - ENDS), key=lambda i: i * GOLDEN % 1)
        return Way(self.whole().choose, frozenset(order[: round((1 - share) * self.layers)]))

    def at(self, ids: Tensor, share: float, make: Callable[[float], Way], rises: bool) -> float:
        """The threshold or level at which a way executes a share of these sequences."""
        low, high = 0.0, 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            way = make(middle)
            now = self.share(self.run(ids, way), way)
            low, high = (middle, high) if (now < share) == rises else (low, middle)
        return (low + high) / 2


class Arms(Plain):
    """A base model, nested experts that were made of it, and their add-on."""

    def __init__(self, nested: str, base: str, file: str = "") -> None:
        pack, self.base = (fetch.find(name) or fetch.pack(name) for name in (nested, base))
        found = nested_file.read(Path(file), pack) if file else nested_file.of_pack(pack)
        assert found is not None
        self.file, self.pack, kind = found, pack, matmul_type(CPU)
        model = TrainableModel(self.base, CPU, kind, silent)
        size, pieces = self.base.description.ffn_width // found.about.count, found.about.widths
        super().__init__(model, ffns(pack, kind), [n * size for n in pieces], pieces)
        self._router, self._bias = found.numbers(ROUTER), found.numbers(BIAS)
        self.fixes = {n: found.numbers(n) for n in (A, B, C)} if found.about.rank else None

    def put(self, router_LMD: Tensor, bias_LM: Tensor) -> None:
        """Other routers."""
        self._router, self._bias = router_LMD, bias_LM

    def refit(self, ids: Tensor) -> None:
        """Down maps in closed form, of sequences to learn from."""
        made, kind = refitted(self.model, self.ffns, self.ends, ids), self.model.dtype
        self.ffns = [Ffn(f.gate_up.to(kind), f.down.to(kind)) for f in made]

    def correct(self, ids: Tensor, rank: int) -> None:
        """Corrections in closed form, of sequences to learn from."""
        self.fixes = closed_form(self.model, self.ffns, self.ends, rank, ids)

    @torch.no_grad()
    def former(self, ids: Tensor) -> Tensor:
        """(B, T, D) normed states of the base model itself."""
        with bf16_products():
            return self.model.run(causal(self.model.embed(ids)))[0]

    def routed(self, threshold: float) -> Way:
        def choose(layer: int, x: Tensor, error: Tensor) -> Tensor:
            z = x.float() @ self._router[layer].T + self._bias[layer]
            return chosen(z.flatten(0, 1), threshold).view(x.shape[:-1])

        return Way(choose)


def sizes(pack: Pack) -> tuple[int, int]:
    """Bytes of all pieces, and of what every token reads beside them."""
    experts = sum(t.size for t in pack.tables if t.kind == "experts")
    beside = sum(t.size for t in pack.tables if t.kind == "layers")
    return experts, beside + pack.table_of("embed" if pack.description.tied else "head").size


def spread_over(values: Sequence[float]) -> float:
    """Standard error of a mean."""
    if len(values) < 2:
        return 0.0
    return float(torch.tensor(values, dtype=torch.float64).std()) / len(values) ** 0.5
