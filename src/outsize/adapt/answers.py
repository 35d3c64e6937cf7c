"""Generation by a trainable model: many prompts at once, padded, with keys and values stored.

Shapes: B prompts, S tokens stored (padded on the left), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from outsize.adapt.trainable import Rows, Stored, TrainableModel, joined


@torch.no_grad()
def answer(
    model: TrainableModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    ends: frozenset[int],
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """New tokens for each prompt, with the one that ended it, if any. Greedy, or drawn at temperature 1
    where a generator is given."""
    width = max(len(p) for p in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    pad_B = torch.tensor([width - len(p) for p in prompts], device=model.device)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
    made: list[list[int]] = [[] for _ in prompts]
    stored: list[Stored] | None = None
    fed = ids.to(model.device)
    for _ in range(max_tokens):
        x, stored = _step(model, fed, pad_B, stored)
        chosen = _choose(model.logits(x[:, -1]), generator)
        for tokens, token in zip(made, chosen.tolist(), strict=True):
            if not (tokens and tokens[-1] in ends):
                tokens.append(token)
        if all(tokens[-1] in ends for tokens in made):
            break
        fed = chosen[:, None]
    return made


def _step(
    model: TrainableModel, ids_BT: Tensor, pad_B: Tensor, stored: list[Stored] | None
) -> tuple[Tensor, list[Stored]]:
    """Padding shifts a sequence's positions, which rotary attention does not see."""
    before = 0 if stored is None else stored[0][0].shape[2]
    count, new = ids_BT.shape
    positions = torch.arange(before, before + new, device=model.device)
    keys = torch.arange(before + new, device=model.device)
    allow = (keys[None, None] <= positions[None, :, None]) & (keys >= pad_B[:, None])[:, None]
    allow = allow | (keys[None, None] == positions[None, :, None])  # padding sees itself: no nan
    rows = Rows(model.embed(ids_BT), positions.expand(count, -1), allow)
    x, made = model.run(rows, stored)
    if stored is not None:
        made = [joined(old, new) for old, new in zip(stored, made, strict=True)]
    return x, made


def _choose(logits_BV: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return logits_BV.argmax(1)
    return torch.multinomial(logits_BV.float().softmax(1), 1, generator=generator)[:, 0]


def batches(
    prompts: Sequence[Sequence[int]], indices: Iterable[int], at_once: int
) -> Iterator[list[int]]:
    """Indices of prompts to be answered together: those of like length."""
    order = sorted(indices, key=lambda i: (len(prompts[i]), i))
    for start in range(0, len(order), at_once):
        yield order[start : start + at_once]
