"""The training task of nested experts: routers that name, for each token, the narrowest width of a
feed-forward that is good enough (DynaMoE, arXiv 2502.12325: supervised by how far each width is from the
whole; formulas and schedule are ours), and low-rank maps that make up for what narrow widths leave out.

A third of the steps execute the labels, the rest what the routers say, so that they learn on the streams that
they will see. Shapes: B sequences, T tokens, L layers, M widths, D width, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from outsize.adapt.head_loss import head_loss
from outsize.adapt.loop import Recipe
from outsize.adapt.nested.aims import level_at
from outsize.adapt.nested.correct import closed_form
from outsize.adapt.nested.prefixes import LABELS, Choose, Ffn, Losses, Prefixes, labels, widest
from outsize.adapt.sparsity.words import spread
from outsize.adapt.statistics import bf16_products, causal
from outsize.adapt.trainable import TrainableModel
from outsize.arguments import real, whole
from outsize.errors import OptionError
from outsize.model.width import chosen

LABEL_SHARE = 1 / 3  # of the steps, in which labels are executed
CALIBRATION = 8  # sequences that levels, scales and corrections are measured on
HELD = 2  # held-out sequences of an evaluation
EVEN = 0.5  # threshold of routers while they are trained
MOST_ODDS = 3.0  # of a router before it is trained, between its commonest label and others
SEEDS = 1_000_003


@dataclass(frozen=True, slots=True)
class NestedRecipe(Recipe):
    """`share`: of the feed-forwards, that labels execute on average; `labels`: what they are by; `rank` of
    corrections (0: none); `weight` of the routers' loss beside the next token's, where corrections learn."""

    steps: int = 200
    batch: int = 2
    rate: float = 1e-2
    share: float = 0.6
    labels: str = "agreement"
    rank: int = 0
    weight: float = 0.5

    def __post_init__(self) -> None:
        super(NestedRecipe, self).__post_init__()
        real("share", self.share, 0.0, 1.0)
        whole("rank", self.rank, 0, 1024)
        if self.labels not in LABELS:
            raise OptionError(f"labels is {self.labels!r}; known are {', '.join(LABELS)}")


@dataclass(frozen=True, slots=True)
class Widths:
    """`pieces` of each width, rising; a piece has `size` neurons; `order`: what names theirs."""

    pieces: tuple[int, ...]
    size: int
    order: str = ""

    @property
    def ends(self) -> list[int]:
        return [n * self.size for n in self.pieces]

    @property
    def shares(self) -> Tensor:
        return torch.tensor(self.pieces, dtype=torch.float32, device="cpu") / self.pieces[-1]


class NestedTask:
    """A `Task` of the training loop."""

    use = "--width "

    def __init__(
        self,
        recipe: NestedRecipe,
        model: TrainableModel,
        ffns: list[Ffn],
        widths: Widths,
        texts: tuple[Tensor, Tensor],
    ) -> None:
        """`texts`: to train on (B, T), and held out."""
        self.recipe, self.model, self._ffns, self.widths = recipe, model, ffns, widths
        self.ids_BT, self.held_BT = texts
        d, m = model.description, len(widths.pieces)
        made: dict[str, Tensor] = {}
        some = spread(self.ids_BT, CALIBRATION)
        if recipe.rank:
            made |= closed_form(model, ffns, widths.ends, recipe.rank, some)
        self._corrections = {n: t.requires_grad_() for n, t in made.items()}
        self.level = 0.0  # until it is known: with labels by it, all of each feed-forward is run
        seen = self._seen(some, by_label=True)
        errors_LNM = torch.stack([e.flatten(0, 1) for e in seen.errors])
        self.level = level_at(errors_LNM, recipe.share, widths.shares)
        self.scale_L = torch.stack([x.float().square().mean().sqrt() for x in seen.inputs])
        router = torch.zeros(d.num_layers, m, d.width, dtype=torch.float32, device="cpu")
        bias = odds(labels(errors_LNM, self.level), m)
        self.parameters: Mapping[str, Tensor] = {
            "router": router.requires_grad_(), "bias": bias.requires_grad_(), **self._corrections,
        }  # fmt: skip

    def loss(self, step: int, part: slice) -> Tensor:
        r, generator = self.recipe, torch.Generator().manual_seed(SEEDS * self.recipe.seed + step)
        rows = torch.randint(len(self.ids_BT), (r.batch,), generator=generator)[part]
        ids = self.ids_BT[rows]
        seen = self._seen(ids, step < LABEL_SHARE * r.steps)
        due = [labels(error, self.level) for error in seen.errors]
        losses = [
            cross_entropy(self.logits(i, x).flatten(0, 1), label.flatten())
            for i, (x, label) in enumerate(zip(seen.inputs, due, strict=True))
        ]
        routers = torch.stack(losses).mean()
        if not self._corrections:
            return routers
        executed = seen.chosen
        made = Prefixes(
            self.model, self._ffns, self.widths.ends, lambda layer, x, error: executed[layer],
            self._corrections,
        )  # fmt: skip
        z, _ = self.model.run(causal(self.model.embed(ids)), change=made)
        states = z[:, :-1].flatten(0, 1).to(self.model.dtype)
        told = head_loss(states, ids[:, 1:].flatten(), self.model.head_VD)
        return told + r.weight * routers

    def _seen(self, ids: Tensor, by_label: bool) -> Prefixes:
        """What widths give on a batch, with errors that labels are made of. Gradients reach nothing."""
        if self.recipe.labels == "agreement":
            return self.run(ids, self._labelled if by_label else self.routed)
        fixed = {name: t.detach() for name, t in self._corrections.items()} or None
        choose = widest(len(self.widths.pieces)) if by_label else self.routed
        seen = Losses(self.model, self._ffns, self.widths.ends, choose, fixed)
        z, _ = self.model.run(causal(self.model.embed(ids).requires_grad_()), change=seen)
        states = z[:, :-1].flatten(0, 1).to(self.model.dtype)
        told = head_loss(states, ids[:, 1:].flatten(), self.model.head_VD)
        torch.autograd.backward([told * ids[:, 1:].numel()])
        return seen

    @torch.no_grad()
    def run(self, ids: Tensor, choose: Choose) -> Prefixes:
        """Sequences, at the widths that `choose` names."""
        fixed = {name: t.detach() for name, t in self._corrections.items()} or None
        seen = Prefixes(self.model, self._ffns, self.widths.ends, choose, fixed)
        with bf16_products():
            seen.states, _ = self.model.run(causal(self.model.embed(ids)), change=seen)
        return seen

    def _labelled(self, layer: int, x: Tensor, error: Tensor) -> Tensor:
        return labels(error, self.level)

    def routed(self, layer: int, x: Tensor, error: Tensor) -> Tensor:
        """What the routers say, at an even threshold."""
        with torch.no_grad():
            return chosen(self.logits(layer, x.detach()), EVEN)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """How often routers name the label, and the share of the feed-forwards that they execute."""
        seen = self.run(spread(self.held_BT, HELD), self.routed)
        pairs = list(zip(seen.errors, seen.chosen, strict=True))
        right = torch.stack([(labels(e, self.level) == w).float().mean() for e, w in pairs])
        share = torch.stack([self.widths.shares[w].mean() for _, w in pairs])
        return {
            "held_out_right": round(float(right.mean()), 4),
            "held_out_share": round(float(share.mean()), 4),
        }

    def about(self) -> dict[str, object]:
        return {"kind": "nested checkpoint", "widths": list(self.widths.pieces)}

    @property
    def routers(self) -> tuple[Tensor, Tensor]:
        """(L, M, D) and (L, M), of inputs as they are."""
        w = self.parameters["router"].detach() / self.scale_L[:, None, None]
        return w, self.parameters["bias"].detach().clone()

    @torch.no_grad()
    def begin_from(self, router_LMD: Tensor, bias_LM: Tensor) -> None:
        """Go on with routers of inputs as they are."""
        self.parameters["router"].copy_(router_LMD * self.scale_L[:, None, None])
        self.parameters["bias"].copy_(bias_LM)

    def logits(self, layer: int, x: Tensor) -> Tensor:
        """(..., M) of a layer's router."""
        p = self.parameters
        return (x.float() / self.scale_L[layer]) @ p["router"][layer].T + p["bias"][layer]


def odds(label_LN: Tensor, count: int) -> Tensor:
    """(L, M): how common each label is, as logits."""
    often = torch.stack([torch.bincount(row, minlength=count) for row in label_LN]).float() + 1
    found = (often / often.sum(1, keepdim=True)).log()
    return (found - found.amax(1, keepdim=True)).clamp_min(-MOST_ODDS)
