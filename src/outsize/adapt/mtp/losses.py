"""Losses of multi-token prediction: mask tokens, gated low-rank additions and a sampler head make a dense
model its own drafter, trained on the model's answers (arXiv 2507.11851).

After an ordinary token at position a come mask tokens m_1..m_k at positions a+1..a+k; mask j learns the token
at a+1+j. They see ordinary tokens up to their anchor a, and those of their own block before them; the
additions act on mask tokens alone, so that ordinary tokens compute what they always did. These run first,
without gradients, and mask tokens afterwards over their stored keys and values.

Ours, where the paper is silent: the mask tokens' vectors learn too; the sampler is fed the true token before
its label; the consistency loss is relative to the target's size; anchors are drawn at random. The paper adds
the ordinary tokens' own loss, which under gated additions has no gradient: `next_token` is for those that are
not gated (docs/drafting.md).
Shapes: B sequences, S tokens, A anchors a sequence, K mask tokens an anchor, M = A * K, D width, N labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from outsize.adapt.change import AS_IS
from outsize.adapt.deltas import Deltas
from outsize.adapt.examples import Example
from outsize.adapt.head_loss import head_loss
from outsize.adapt.loop import Recipe
from outsize.adapt.trainable import Rows, Stored, TrainableModel
from outsize.arguments import real, whole
from outsize.draft import mtp_head
from outsize.draft.drafter import MOST
from outsize.errors import OptionError
from outsize.model.lora import widths
from outsize.model_config import Description

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class MtpRecipe(Recipe):
    """How to train mask tokens."""

    k: int = 4  # mask tokens
    rank: int = 16  # of the additions
    anchors: int = 32  # of each sequence
    scale: float = 2.0  # of the additions
    sampler: bool = True
    consistency: float = 1.0  # weight of that loss
    gated: bool = True
    # Weight of the ordinary tokens' own loss; only what is not gated moves it.
    next_token: float = 0.0

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        for name, most in (("k", MOST), ("rank", 1 << 14), ("anchors", 1 << 16)):
            whole(name, getattr(self, name), 1, most)
        real("next_token", self.next_token, 0.0, 1e3)
        if self.gated and self.next_token:
            raise OptionError(
                f"next_token is {self.next_token}, but gated additions never reach ordinary tokens, so that "
                "their loss has no gradient; leave it out, or train with gated false"
            )


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences padded on the right, and anchors: indices of ordinary tokens after which mask tokens go."""

    tokens_BS: Tensor
    length_B: Tensor
    anchor_BA: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(t.to(device) for t in (self.tokens_BS, self.length_B, self.anchor_BA)))


def new_parameters(d: Description, recipe: MtpRecipe, embed_VD: Tensor) -> dict[str, Tensor]:
    """What training begins with: additions that add nothing yet, mask tokens as large as the model's own."""
    generator = torch.Generator().manual_seed(recipe.seed)
    out: dict[str, Tensor] = {}
    for layer in range(d.num_layers):
        for name, (num_rows, width) in widths(d).items():
            a = torch.empty(recipe.rank, width)
            out[f"{layer}.{name}.A"] = a.normal_(0, 1 / math.sqrt(width), generator=generator)
            out[f"{layer}.{name}.B"] = torch.zeros(num_rows, recipe.rank)
    size = float(embed_VD.float().std())
    out["masks"] = torch.empty(recipe.k, d.width).normal_(0, size, generator=generator)
    made = mtp_head.new(d.width, generator) if recipe.sampler else {}
    return out | {mtp_head.PREFIX + name: value for name, value in made.items()}


def deltas(parameters: Parameters, scale: float) -> Deltas:
    names = [name[:-2] for name in parameters if name.endswith(".A")]
    return Deltas({n: (parameters[f"{n}.A"], parameters[f"{n}.B"]) for n in names}, scale)


def sample_batch(
    examples: Sequence[Example], recipe: MtpRecipe, step: int, part: slice = slice(None)
) -> Batch:
    """The batch of one step, or a part of it: by step and seed alone."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    rows = torch.randint(len(examples), (recipe.batch,), generator=generator).tolist()
    picked = [examples[i] for i in rows]
    anchors = [_anchors(e, recipe.anchors, generator) for e in picked]
    return collate(picked[part], anchors[part])


def _anchors(example: Example, count: int, generator: torch.Generator) -> list[int]:
    """Random tokens to put mask tokens after, from the prompt's last to the one before the answer's end."""
    first, last = example.num_prompt - 1, len(example.tokens) - 2
    size = max(1, last - first)
    order = torch.randperm(size, generator=generator)[:count].sort().values + first
    return [int(a) for a in order]


def all_anchors(example: Example) -> list[int]:
    return list(range(example.num_prompt - 1, len(example.tokens) - 1))


def collate(examples: Sequence[Example], anchors: Sequence[Sequence[int]]) -> Batch:
    """A padded batch. A short sequence's missing anchors are -1: no labels."""
    longest, most = max(len(e.tokens) for e in examples), max(len(a) for a in anchors)
    tokens = torch.zeros(len(examples), longest, dtype=torch.long)
    places = torch.full((len(examples), most), -1)
    for i, (example, found) in enumerate(zip(examples, anchors, strict=True)):
        tokens[i, : len(example.tokens)] = torch.tensor(example.tokens)
        places[i, : len(found)] = torch.tensor(found)
    return Batch(tokens, torch.tensor([len(e.tokens) for e in examples]), places)


def ordinary(
    model: TrainableModel, batch: Batch, added: Deltas | None = None
) -> tuple[Tensor, list[Stored]]:
    """Normed states of ordinary tokens, and their keys and values."""
    count, size = batch.tokens_BS.shape
    positions = torch.arange(size, device=model.device).expand(count, -1)
    allow = torch.ones(size, size, dtype=torch.bool, device=model.device).tril()
    rows = Rows(model.embed(batch.tokens_BS), positions, allow.expand(count, -1, -1))
    return model.run(rows, change=added or AS_IS)


def mask_rows(model: TrainableModel, batch: Batch, masks_KD: Tensor) -> Rows:
    """The mask tokens after every anchor, block by block."""
    count, size = batch.tokens_BS.shape
    num_masks, num_anchors = len(masks_KD), batch.anchor_BA.shape[1]
    anchor_BM = batch.anchor_BA.clamp_min(0).repeat_interleave(num_masks, dim=1)
    offset_M = torch.arange(num_masks, device=model.device).repeat(num_anchors)
    block_M = torch.arange(num_anchors, device=model.device).repeat_interleave(num_masks)
    before = torch.arange(size, device=model.device) <= anchor_BM[:, :, None]
    same = (block_M[:, None] == block_M) & (offset_M[:, None] >= offset_M)
    allow = torch.cat([before, same.expand(count, -1, -1)], dim=2)
    h = masks_KD.to(model.residual).repeat(num_anchors, 1).expand(count, -1, -1)
    return Rows(h, anchor_BM + offset_M + 1, allow)


class Labels(NamedTuple):
    """For each mask token that has a label: its place among all of them, label, the token before, and the
    ordinary state that predicts the same."""

    place_N: Tensor
    label_N: Tensor
    previous_N: Tensor
    state_N: Tensor  # index into flattened ordinary states


def labels(batch: Batch, num_masks: int) -> Labels:
    device, size = batch.tokens_BS.device, batch.tokens_BS.shape[1]
    offset_K = torch.arange(1, num_masks + 1, device=device)
    target_BM = (batch.anchor_BA[:, :, None] + offset_K + 1).flatten(1)
    has_anchor_BM = batch.anchor_BA.repeat_interleave(num_masks, dim=1) >= 0
    good = (target_BM < batch.length_B[:, None]) & has_anchor_BM
    place_N = good.flatten().nonzero()[:, 0]
    row_BM = torch.arange(len(target_BM), device=device)[:, None].expand_as(target_BM)
    at_N = (row_BM * size + target_BM).flatten()[place_N]
    flat = batch.tokens_BS.flatten()
    return Labels(place_N, flat[at_N], flat[at_N - 1], at_N - 1)


class Losses(NamedTuple):
    base: Tensor
    sampled: Tensor
    consistent: Tensor
    ordinary: Tensor  # of the tokens after the anchors, by the ordinary ones; 0 if not asked for


def losses(
    model: TrainableModel, parameters: Parameters, recipe: MtpRecipe, batch: Batch
) -> Losses:
    """Cross-entropies of the mask tokens' predictions by the plain head and by the sampler; and how far their
    states are from those of the ordinary tokens that predict the same, relative to these."""
    added = deltas(parameters, recipe.scale)
    with torch.set_grad_enabled(not recipe.gated):
        x_BSD, stored = ordinary(model, batch, None if recipe.gated else added)
    z_BMD, _ = model.run(mask_rows(model, batch, parameters["masks"]), stored, added)
    found = labels(batch, recipe.k)
    z_ND = z_BMD.flatten(0, 1)[found.place_N]
    base = head_loss(z_ND, found.label_N, model.head_VD)
    nothing = torch.zeros((), device=model.device)
    sampled = nothing
    if recipe.sampler:
        head = mtp_head.stages(mtp_head.of(parameters), mtp_head.plainly)
        mixed = mtp_head.mix(z_ND, model.embed(found.previous_N), head)
        sampled = head_loss(mixed, found.label_N, model.head_VD)
    spoken = next_token_loss(model, x_BSD, batch) if recipe.next_token else nothing
    if not recipe.consistency:
        return Losses(base, sampled, nothing, spoken)
    target = x_BSD.detach().flatten(0, 1)[found.state_N]
    consistent = ((target - z_ND).square().sum(1) / target.square().sum(1)).mean()
    return Losses(base, sampled, consistent, spoken)


def next_token_loss(model: TrainableModel, x_BSD: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the token after each anchor under the model's own head: what ordinary training lowers,
    and additions that are not gated may raise."""
    row_N, column_N = (batch.anchor_BA >= 0).nonzero(as_tuple=True)
    at_N = batch.anchor_BA[row_N, column_N]
    return head_loss(x_BSD[row_N, at_N], batch.tokens_BS[row_N, at_N + 1], model.head_VD)


def total(found: Losses, recipe: MtpRecipe) -> Tensor:
    masked = found.base + found.sampled + recipe.consistency * found.consistent
    return masked + recipe.next_token * found.ordinary
