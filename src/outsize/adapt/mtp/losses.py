"""Any dense model its own drafter: mask tokens, gated low-rank additions and a sampler head, trained on the
model's answers (arXiv 2507.11851).

After an ordinary token at position a come masks m_1..m_k at positions a+1..a+k; mask j learns the token at
a+1+j. Masks see ordinary tokens up to their anchor a, and the masks of their own block before them; the
additions act on masks alone, so that ordinary tokens compute what they always did. That is why they run
first, without gradients, and masks afterwards over their stored keys and values.

Ours, where the paper is silent: the masks' vectors learn too; the sampler is fed the true token before its
label; the consistency loss is relative to the target's size; anchors are drawn at random. The paper
adds the ordinary tokens' own loss, which under gated additions has no gradient: `next_token` is for those
that are not gated (docs/drafting.md).
Shapes: B sequences, S tokens, A anchors a sequence, K masks an anchor, M = A * K, D width, N labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from outsize.adapt.mtp.head_loss import head_loss
from outsize.adapt.trainable import Deltas, Rows, Stored, TrainableModel
from outsize.arguments import real, whole
from outsize.draft import mtp_head
from outsize.draft.drafter import MOST
from outsize.errors import OptionError
from outsize.model.lora import widths
from outsize.model_config import Description

Parameters = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train. What it says decides the result: the same recipe, data and device give the same
    weights."""

    k: int = 4
    rank: int = 16
    steps: int = 2000
    batch: int = 8  # sequences a step
    anchors: int = 32  # of each
    rate: float = 1e-3
    warmup: float = 0.1  # of the steps; then down to nothing along a cosine
    length: int = 512  # tokens of a sequence; longer ones are left out
    seed: int = 0
    scale: float = 2.0  # of the additions
    sampler: bool = True
    consistency: float = 1.0  # weight of that loss
    gated: bool = True
    next_token: float = (
        0.0  # weight of the ordinary tokens' own loss; only what is not gated moves it
    )

    def __post_init__(self) -> None:
        for name, most in (
            ("k", MOST), ("rank", 1 << 14), ("steps", 1 << 30), ("batch", 1 << 16),
            ("anchors", 1 << 16), ("length", 1 << 24),
        ):  # fmt: skip
            whole(name, getattr(self, name), 1, most)
        real("rate", self.rate, 0.0, 1.0)
        real("next_token", self.next_token, 0.0, 1e3)
        if self.gated and self.next_token:
            raise OptionError(
                f"next_token is {self.next_token}, but gated additions never reach ordinary tokens, so that "
                "their loss has no gradient; leave it out, or train with gated false"
            )

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def rate_at(self, step: int) -> float:
        warm = max(1, int(self.warmup * self.steps))
        if step < warm:
            return self.rate * (step + 1) / warm
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


class Example(NamedTuple):
    """A prompt and its answer, as tokens."""

    tokens: list[int]
    num_prompt: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded on the right. Anchors are indices of ordinary tokens."""

    tokens_BS: Tensor
    length_B: Tensor
    anchor_BA: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(t.to(device) for t in (self.tokens_BS, self.length_B, self.anchor_BA)))


def new_parameters(d: Description, recipe: Recipe, embed_VD: Tensor) -> Parameters:
    """Additions that add nothing yet; masks as large as the model's own tokens."""
    generator = torch.Generator().manual_seed(recipe.seed)
    out: Parameters = {}
    for layer in range(d.num_layers):
        for name, (num_rows, width) in widths(d).items():
            a = torch.empty(recipe.rank, width)
            out[f"{layer}.{name}.A"] = a.normal_(0, 1 / math.sqrt(width), generator=generator)
            out[f"{layer}.{name}.B"] = torch.zeros(num_rows, recipe.rank)
    size = float(embed_VD.float().std())
    out["masks"] = torch.empty(recipe.k, d.width).normal_(0, size, generator=generator)
    made = mtp_head.new(d.width, generator) if recipe.sampler else {}
    return out | {mtp_head.PREFIX + name: value for name, value in made.items()}


def deltas(parameters: Mapping[str, Tensor], scale: float) -> Deltas:
    names = [name[:-2] for name in parameters if name.endswith(".A")]
    return Deltas({n: (parameters[f"{n}.A"], parameters[f"{n}.B"]) for n in names}, scale)


def draw(examples: Sequence[Example], recipe: Recipe, step: int, rank: int, world: int) -> Batch:
    """The batch of one step for one of `world` processes: by step and seed alone."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    rows = torch.randint(len(examples), (recipe.batch,), generator=generator).tolist()
    picked = [examples[i] for i in rows]
    anchors = [_anchors(e, recipe.anchors, generator) for e in picked]
    return collate(picked[rank::world], anchors[rank::world])


def _anchors(example: Example, count: int, generator: torch.Generator) -> list[int]:
    """Of the tokens before the answer's end, some at random: the last of the prompt on."""
    first, last = example.num_prompt - 1, len(example.tokens) - 2
    size = max(1, last - first)
    order = torch.randperm(size, generator=generator)[:count].sort().values + first
    return [int(a) for a in order]


def all_anchors(example: Example) -> list[int]:
    return list(range(example.num_prompt - 1, len(example.tokens) - 1))


def collate(examples: Sequence[Example], anchors: Sequence[Sequence[int]]) -> Batch:
    """A short sequence's missing anchors are -1: no labels."""
    longest, most = max(len(e.tokens) for e in examples), max(len(a) for a in anchors)
    tokens, places = (
        torch.zeros(len(examples), longest).long(),
        torch.full((len(examples), most), -1),
    )
    for i, (example, found) in enumerate(zip(examples, anchors, strict=True)):
        tokens[i, : len(example.tokens)] = torch.tensor(example.tokens)
        places[i, : len(found)] = torch.tensor(found)
    return Batch(tokens, torch.tensor([len(e.tokens) for e in examples]), places)


def ordinary(
    twin: TrainableModel, batch: Batch, added: Deltas | None = None
) -> tuple[Tensor, list[Stored]]:
    """Normed states of ordinary tokens, and their keys and values."""
    count, size = batch.tokens_BS.shape
    positions = torch.arange(size, device=twin.device).expand(count, -1)
    allow = torch.ones(size, size, dtype=torch.bool, device=twin.device).tril()
    rows = Rows(twin.embed(batch.tokens_BS), positions, allow.expand(count, -1, -1))
    return twin.run(rows, deltas=added)


def mask_rows(twin: TrainableModel, batch: Batch, masks_KD: Tensor) -> Rows:
    """The masks after every anchor, block by block."""
    count, size = batch.tokens_BS.shape
    num_masks, num_anchors = len(masks_KD), batch.anchor_BA.shape[1]
    anchor_BM = batch.anchor_BA.clamp_min(0).repeat_interleave(num_masks, dim=1)
    offset_M = torch.arange(num_masks, device=twin.device).repeat(num_anchors)
    block_M = torch.arange(num_anchors, device=twin.device).repeat_interleave(num_masks)
    before = torch.arange(size, device=twin.device) <= anchor_BM[:, :, None]
    same = (block_M[:, None] == block_M) & (offset_M[:, None] >= offset_M)
    allow = torch.cat([before, same.expand(count, -1, -1)], dim=2)
    h = masks_KD.to(twin.residual).repeat(num_anchors, 1).expand(count, -1, -1)
    return Rows(h, anchor_BM + offset_M + 1, allow)


class Labels(NamedTuple):
    """For each mask that has a label: its place among all masks, label, the token before, and the
    ordinary state that predicts the same."""

    place_N: Tensor
    label_N: Tensor
    previous_N: Tensor
    state_N: Tensor  # index into flattened ordinary states


def labels(batch: Batch, num_masks: int) -> Labels:
    device, size = batch.tokens_BS.device, batch.tokens_BS.shape[1]
    offset_K = torch.arange(1, num_masks + 1, device=device)
    target_BM = (batch.anchor_BA[:, :, None] + offset_K + 1).flatten(1)
    good = (target_BM < batch.length_B[:, None]) & (
        batch.anchor_BA.repeat_interleave(num_masks, dim=1) >= 0
    )
    place_N = good.flatten().nonzero()[:, 0]
    row_BM = torch.arange(len(target_BM), device=device)[:, None].expand_as(target_BM)
    at_N = (row_BM * size + target_BM).flatten()[place_N]
    flat = batch.tokens_BS.flatten()
    return Labels(place_N, flat[at_N], flat[at_N - 1], at_N - 1)


class Losses(NamedTuple):
    base: Tensor
    sampled: Tensor
    consistent: Tensor
    ordinary: (
        Tensor  # of the tokens after the anchors, by the ordinary tokens; nothing if not asked for
    )


def losses(twin: TrainableModel, parameters: Parameters, recipe: Recipe, batch: Batch) -> Losses:
    """Cross-entropies of the masks' guesses by the plain head and by the sampler; and how far their
    states are from those of the ordinary tokens that predict the same, relative to these."""
    added = deltas(parameters, recipe.scale)
    with torch.set_grad_enabled(not recipe.gated):
        x_BSD, stored = ordinary(twin, batch, None if recipe.gated else added)
    z_BMD, _ = twin.run(mask_rows(twin, batch, parameters["masks"]), stored, added)
    found = labels(batch, recipe.k)
    z_ND = z_BMD.flatten(0, 1)[found.place_N]
    base = head_loss(z_ND, found.label_N, twin.head_VD)
    nothing = torch.zeros((), device=twin.device)
    sampled = nothing
    if recipe.sampler:
        head = mtp_head.stages(mtp_head.of(parameters), mtp_head.plainly)
        mixed = mtp_head.mix(z_ND, twin.embed(found.previous_N), head)
        sampled = head_loss(mixed, found.label_N, twin.head_VD)
    spoken = next_token_loss(twin, x_BSD, batch) if recipe.next_token else nothing
    if not recipe.consistency:
        return Losses(base, sampled, nothing, spoken)
    target = x_BSD.detach().flatten(0, 1)[found.state_N]
    consistent = ((target - z_ND).square().sum(1) / target.square().sum(1)).mean()
    return Losses(base, sampled, consistent, spoken)


def next_token_loss(twin: TrainableModel, x_BSD: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the token after each anchor under the model's own head: what ordinary training lowers,
    and additions that are not gated may raise."""
    row_N, column_N = (batch.anchor_BA >= 0).nonzero(as_tuple=True)
    at_N = batch.anchor_BA[row_N, column_N]
    return head_loss(x_BSD[row_N, at_N], batch.tokens_BS[row_N, at_N + 1], twin.head_VD)


def total(found: Losses, recipe: Recipe) -> Tensor:
    masked = found.base + found.sampled + recipe.consistency * found.consistent
    return masked + recipe.next_token * found.ordinary
