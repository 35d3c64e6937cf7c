"""Simulates what drafts would be accepted: the decoding loop over known answers, with the predictions after
every token computed at once. Exact for greedy answers of the same weights, since a step's mask tokens always
follow a true prefix.

Shapes: B sequences, A anchors, K mask tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from outsize.adapt.examples import Example
from outsize.adapt.mtp.losses import (
    Parameters,
    all_anchors,
    collate,
    deltas,
    mask_rows,
    ordinary,
)
from outsize.adapt.trainable import TrainableModel
from outsize.draft import mtp_head

AT_ONCE, ANCHORS = 4, 32  # sequences, and tokens of each that mask tokens come after, in one pass


@dataclass(slots=True)
class Simulated:
    """Tokens and steps so far, with mask tokens after every token (quadratic) or after the last (linear)."""

    tokens: int = 0
    quadratic: int = 0
    linear: int = 0

    @property
    def by_quadratic(self) -> float:
        return self.tokens / max(1, self.quadratic)

    @property
    def by_linear(self) -> float:
        return self.tokens / max(1, self.linear)

    def add(self, accepted: Sequence[int], k: int) -> None:
        """`accepted[i]`: leading correct predictions after anchor i."""
        self.tokens += len(accepted)
        at = 0
        while at < len(accepted):
            at += 1 + accepted[at]
            self.quadratic += 1
        at, ready = 0, True
        while at < len(accepted):
            taken = accepted[at] if ready else 0
            ready = not ready or taken == k
            at += 1 + taken
            self.linear += 1


@torch.no_grad()
def predictions(
    model: TrainableModel, parameters: Parameters, scale: float, examples: Sequence[Example], k: int
) -> Tensor:
    """(B, A, K): what the mask tokens after each token of an answer predict, each given the one before."""
    batch = collate(examples, [all_anchors(e) for e in examples]).to(model.device)
    _, stored = ordinary(model, batch)
    masks_KD, added, found = parameters["masks"][:k], deltas(parameters, scale), list[Tensor]()
    for anchor_BA in batch.anchor_BA.split(ANCHORS, dim=1):
        rows = mask_rows(model, replace(batch, anchor_BA=anchor_BA), masks_KD)
        found.append(model.run(rows, stored, added)[0].unflatten(1, (-1, k)))
    z_BAKD = torch.cat(found, dim=1)
    head = mtp_head.stages(mtp_head.of(parameters), mtp_head.plainly)
    chosen = batch.tokens_BS.gather(1, batch.anchor_BA.clamp_min(0) + 1)
    out = []
    for j in range(k):
        state = z_BAKD[:, :, j]
        if head:
            state = mtp_head.mix(state, model.embed(chosen), head)
        chosen = torch.stack([model.logits(row).argmax(-1) for row in state])
        out.append(chosen)
    return torch.stack(out, dim=-1).cpu()


def leading(example: Example, guess_AK: Tensor) -> list[int]:
    """For each anchor, how many of its predictions in a row are the answer's own tokens."""
    size, k = len(example.tokens), guess_AK.shape[1]
    out = []
    for row, anchor in enumerate(all_anchors(example)):
        truth = example.tokens[anchor + 2 : anchor + 2 + k]
        same = [g == t for g, t in zip(guess_AK[row].tolist(), truth, strict=False)]
        out.append(min([*(i for i, good in enumerate(same) if not good), len(same), size]))
    return out


def simulate(
    model: TrainableModel,
    parameters: Parameters,
    scale: float,
    examples: Sequence[Example],
    k: int,
    at_once: int = AT_ONCE,
) -> Simulated:
    """Tokens a step over all examples."""
    found = Simulated()
    for start in range(0, len(examples), at_once):
        part = examples[start : start + at_once]
        made = predictions(model, parameters, scale, part, k)
        for example, guess in zip(part, made, strict=True):
            found.add(leading(example, guess), k)
    return found
