"""Generation by a trainable model: many prompts at once, padded, with keys and values stored.

Shapes: B prompts, S tokens stored (padded on the left), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from outsize.adapt.change import AS_IS, Change
from outsize.adapt.trainable import Rows, Stored, TrainableModel, joined

Draws = torch.Generator | Sequence[torch.Generator] | None


@torch.no_grad()
def answer(
    model: TrainableModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    ends: frozenset[int],
    generator: Draws = None,
    change: Change = AS_IS,
) -> list[list[int]]:
    """New tokens for each prompt, with the one that ended it, if any. Greedy, or drawn at temperature 1
    where a generator is given: one for all, or one for each prompt, whose tokens then do not depend on the
    others. `change`: what the model computes otherwise."""
    width = max(len(p) for p in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    pad_B = torch.tensor([width - len(p) for p in prompts], device=model.device)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
    made: list[list[int]] = [[] for _ in prompts]
    stored: list[Stored] | None = None
    fed = ids.to(model.device)
    for _ in range(max_tokens):
        x, stored = _step(model, fed, pad_B, stored, change)
        chosen = _choose(model.logits(x[:, -1]), generator)
        for tokens, token in zip(made, chosen.tolist(), strict=True):
            if not (tokens and tokens[-1] in ends):
                tokens.append(token)
        if all(tokens[-1] in ends for tokens in made):
            break
        fed = chosen[:, None]
    return made


def _step(
    model: TrainableModel,
    ids_BT: Tensor,
    pad_B: Tensor,
    stored: list[Stored] | None,
    change: Change,
) -> tuple[Tensor, list[Stored]]:
    """Padding shifts a sequence's positions, which rotary attention does not see."""
    before = 0 if stored is None else stored[0][0].shape[2]
    count, new = ids_BT.shape
    positions = torch.arange(before, before + new, device=model.device)
    keys = torch.arange(before + new, device=model.device)
    allow = (keys[None, None] <= positions[None, :, None]) & (keys >= pad_B[:, None])[:, None]
    allow = allow | (keys[None, None] == positions[None, :, None])  # padding sees itself: no nan
    rows = Rows(model.embed(ids_BT), positions.expand(count, -1), allow)
    x, made = model.run(rows, stored, change)
    if stored is not None:
        made = [joined(old, new) for old, new in zip(stored, made, strict=True)]
    return x, made


def _choose(logits_BV: Tensor, generator: Draws) -> Tensor:
    if generator is None:
        return logits_BV.argmax(1)
    if not isinstance(generator, torch.Generator):
        drawn = [torch.rand(1, dtype=torch.float64, generator=g) for g in generator]
        below = logits_BV.double().softmax(1).cumsum(1)
        at = torch.searchsorted(below, torch.stack(drawn).to(below.device))[:, 0]
        return at.clamp_max(logits_BV.shape[1] - 1)
    return torch.multinomial(logits_BV.float().softmax(1), 1, generator=generator)[:, 0]


def batches(
    prompts: Sequence[Sequence[int]], indices: Iterable[int], at_once: int
) -> Iterator[list[int]]:
    """Indices of prompts to be answered together: those of like length."""
    order = sorted(indices, key=lambda i: (len(prompts[i]), i))
    for start in range(0, len(order), at_once):
        yield order[start : start + at_once]
