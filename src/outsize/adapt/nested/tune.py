"""The training task that makes narrow widths good: all feed-forwards learn, with their routers, to predict as
the model did before (DynaMoE, arXiv 2502.12325; its formulas could not be read: these are ours).

A step runs each of its sequences at one share of the feed-forwards, of several by chance: as labels say in
the first third of the steps, as the routers say in the rest. The loss is how far its predictions are from the
former model's; how far each width's output is from the former feed-forward's of the same input, at all widths
at once, which few tokens tell already; and the routers' cross-entropy to the labels.

Shapes: B sequences, T tokens, L layers, M widths, D width, F neurons, S shares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from outsize.adapt.divergence import divergence, following
from outsize.adapt.head_loss import head_divergence
from outsize.adapt.loop import Recipe
from outsize.adapt.nested.aims import level_at, threshold_at
from outsize.adapt.nested.prefixes import Choose, Ffn, Prefixes, labels, widest
from outsize.adapt.nested.task import LABEL_SHARE, SEEDS, Widths, odds
from outsize.adapt.sparsity.words import spread
from outsize.adapt.statistics import FIRST, bf16_products, causal
from outsize.adapt.trainable import TrainableModel
from outsize.arguments import real
from outsize.model.width import chosen

SHARES = (0.4, 0.5, 0.75, 0.9)  # of the feed-forwards, that sequences are run at
JUDGED = (1, 2)  # of them, that are judged on held-out text
HELD, JUDGED_TOKENS = 3, 128  # held-out sequences of an evaluation, and the tokens of each
CALIBRATION = 4  # sequences that the first levels and scales are measured on
ASKED = 4  # one token in so many is asked where levels and thresholds are
SMOOTH = 0.9  # of levels and thresholds, from step to step
ROUTERS = 1e-2  # the highest rate of what routers learn at, whatever that of feed-forwards is


@dataclass(frozen=True, slots=True)
class TuneRecipe(Recipe):
    """`share`: of the feed-forwards, that the routers' labels execute; `match`, `weight`: what outputs of
    feed-forwards, and routers, count beside the divergence."""

    steps: int = 0
    batch: int = 1
    rate: float = 3e-4
    share: float = 0.6
    match: float = 1.0
    weight: float = 0.5

    @property
    def least_steps(self) -> int:
        """None: feed-forwards stay as they are."""
        return 0

    @property
    def fused(self) -> bool:
        return True

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        real("share", self.share, 0.0, 1.0)
        for name in ("match", "weight"):
            real(name, getattr(self, name), 0.0, 1000.0)


class _Matching(Prefixes):
    """As `Prefixes`; and how much of the former feed-forward's output each width misses."""

    def __init__(
        self, model: TrainableModel, ffns: Sequence[Ffn], ends: Sequence[int], choose: Choose
    ) -> None:
        super().__init__(model, ffns, ends, choose)
        self.missed: list[Tensor] = []  # by layer

    def look(self, sums: Sequence[Tensor], layer: int, whole: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            due = whole()[:, FIRST:].float()
            size = due.square().mean().clamp_min(1e-12)
        missed = [(s[:, FIRST:] - due).square().mean() / size for s in sums]
        self.missed.append(torch.stack(missed).mean())


class TuneTask:
    """A `Task` of the training loop. `ffns`: in the order of their neurons, where training begins."""

    use = "--width "

    def __init__(
        self,
        recipe: TuneRecipe,
        model: TrainableModel,
        ffns: Sequence[Ffn],
        widths: Widths,
        texts: tuple[Tensor, Tensor],
    ) -> None:
        """`texts`: to train on (B, T), and held out."""
        self.recipe, self.model, self.widths = recipe, model, widths
        self._ids_BT, self._held_BT = texts[0], spread(texts[1], HELD)[:, :JUDGED_TOKENS]
        self.parameters: dict[str, Tensor] = {}
        for layer, f in enumerate(ffns):
            self.parameters[f"{layer}.gate_up"] = f.gate_up.float().clone().requires_grad_()
            self.parameters[f"{layer}.down"] = f.down.float().clone().requires_grad_()
        self._gain = ROUTERS / max(recipe.rate, 1e-9)
        self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        """Routers that say what is common, and what levels and thresholds execute at first."""
        d, m = self.model.description, len(self.widths.pieces)
        self._whole = widest(m)
        seen = self._run(spread(self._ids_BT, CALIBRATION), self._whole)
        error_LNM = torch.stack([e.flatten(0, 1) for e in seen.errors])
        label = labels(error_LNM, level_at(error_LNM, self.recipe.share, self.widths.shares))
        scale = torch.stack([x.float().square().mean().sqrt() for x in seen.inputs])
        self._scale_L = scale.clamp_min(1e-9)
        bias = odds(label, m) / self._gain
        router = torch.zeros(d.num_layers, m, d.width, dtype=torch.float32, device="cpu")
        self.parameters |= {"router": router.requires_grad_(), "bias": bias.requires_grad_()}
        self._levels, self._thresholds = self._aims(seen)

    @property
    def ffns(self) -> list[Ffn]:
        """What multiplies, from what is learned."""
        p, kind = self.parameters, self.model.dtype
        count = self.model.description.num_layers
        return [Ffn(p[f"{i}.gate_up"].to(kind), p[f"{i}.down"].to(kind)) for i in range(count)]

    @property
    def routers(self) -> tuple[Tensor, Tensor]:
        """(L, M, D) and (L, M), of inputs as they are."""
        scale = (self._gain / self._scale_L)[:, None, None]
        return self.parameters["router"].detach() * scale, self.parameters[
            "bias"
        ].detach() * self._gain

    def loss(self, step: int, part: slice) -> Tensor:
        r, generator = self.recipe, torch.Generator().manual_seed(SEEDS * self.recipe.seed + step)
        rows = torch.randint(len(self._ids_BT), (r.batch,), generator=generator)[part]
        aims = torch.randint(len(SHARES), (r.batch,), generator=generator)[part]
        ids, is_labelled = self._ids_BT[rows], step < LABEL_SHARE * r.steps
        with torch.no_grad():
            due, _ = self.model.run(causal(self.model.embed(ids)))
        seen = self._run(ids, self._labelled(aims) if is_labelled else self._routed(aims))
        apart = head_divergence(seen.states.flatten(0, 1), due.flatten(0, 1), self.model.head_VD)
        label = [labels(error, float(self._levels[-1])) for error in seen.errors]
        asked = [
            cross_entropy(self._logits(i, x).flatten(0, 1), due_BT.flatten())
            for i, (x, due_BT) in enumerate(zip(seen.inputs, label, strict=True))
        ]
        self._adjust(seen)
        return (
            apart + r.match * torch.stack(seen.missed).mean() + r.weight * torch.stack(asked).mean()
        )

    def _run(self, ids: Tensor, choose: Choose) -> _Matching:
        """Sequences, at the widths that `choose` names; with gradients where they are wanted."""
        seen = _Matching(self.model, self.ffns, self.widths.ends, choose)
        with bf16_products():
            seen.states, _ = self.model.run(causal(self.model.embed(ids)), change=seen)
        return seen

    def _labelled(self, aims_B: Tensor) -> Choose:
        level_B11 = self._levels[aims_B].float()[:, None, None]
        return lambda layer, x, error: labels(error, level_B11)

    def _routed(self, aims_B: Tensor) -> Choose:
        threshold_B11 = self._thresholds[aims_B].float()[:, None, None]

        def choose(layer: int, x: Tensor, error: Tensor) -> Tensor:
            with torch.no_grad():
                return chosen(self._logits(layer, x), threshold_B11)

        return choose

    def _logits(self, layer: int, x: Tensor) -> Tensor:
        """(..., M) of a layer's router."""
        p = self.parameters
        z = (x.detach().float() / self._scale_L[layer]) @ p["router"][layer].T + p["bias"][layer]
        return self._gain * z

    @torch.no_grad()
    def _aims(self, seen: Prefixes) -> tuple[Tensor, Tensor]:
        """Levels at which labels execute each of the shares, and the recipe's; and routers' thresholds."""
        shares = self.widths.shares
        error_LNM = torch.stack([e.flatten(0, 1)[::ASKED] for e in seen.errors])
        rows = (x.flatten(0, 1)[::ASKED] for x in seen.inputs)
        z_LNM = torch.stack([self._logits(i, x_ND) for i, x_ND in enumerate(rows)])
        levels = [level_at(error_LNM, share, shares) for share in (*SHARES, self.recipe.share)]
        thresholds = [threshold_at(z_LNM, share, shares) for share in SHARES]
        made = (torch.tensor(x, dtype=torch.float64, device="cpu") for x in (levels, thresholds))
        return next(made), next(made)

    def _adjust(self, seen: Prefixes) -> None:
        """Levels and thresholds follow weights as they move."""
        levels, thresholds = self._aims(seen)
        self._levels = SMOOTH * self._levels + (1 - SMOOTH) * levels
        self._thresholds = SMOOTH * self._thresholds + (1 - SMOOTH) * thresholds

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """On held-out text, divergence from the former model, by routers near two shares, and of all of each
        feed-forward."""
        out: dict[str, float] = {}
        for aim in JUDGED:
            seen = self._run(self._held_BT, self._routed(torch.tensor([aim] * len(self._held_BT))))
            share = torch.stack([self.widths.shares[w].mean() for w in seen.chosen]).mean()
            name = f"{SHARES[aim]:.2f}".removeprefix("0.")
            out |= {f"kl_{name}": self._kl(seen.states), f"share_{name}": round(float(share), 4)}
        return out | {"kl_full": self._kl(self._run(self._held_BT, self._whole).states)}

    def _kl(self, states_BTD: Tensor) -> float:
        model, ids = self.model, self._held_BT
        due, _ = model.run(causal(model.embed(ids)))
        rows = due.flatten(0, 1), states_BTD.flatten(0, 1)
        return round(divergence(model, *rows, following(ids).flatten()).kl, 5)

    def about(self) -> dict[str, object]:
        kind, w = "nested tuning checkpoint", self.widths
        return {"kind": kind, "widths": list(w.pieces), "order": w.order}

    def kept(self) -> dict[str, Tensor]:
        return {"levels": self._levels, "thresholds": self._thresholds, "scale": self._scale_L}

    def restore(self, kept: Mapping[str, Tensor]) -> None:
        self._levels, self._thresholds = kept["levels"], kept["thresholds"]
        self._scale_L = kept["scale"]
