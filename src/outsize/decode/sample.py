"""From logits to a token: plain functions, one draw a token from the sequence's own generator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from outsize.draft.verify import Pick
from outsize.options import Options

PENALTY_REACH = 64
Floats = NDArray[np.float64]


def greedy(logits_V: Tensor, tokens: Sequence[int]) -> int:
    """The likeliest token; of equals, the first."""
    return int(logits_V.argmax())


def penalize(logits_V: Tensor, tokens: Sequence[int], penalty: float) -> Tensor:
    """Make recently seen tokens less likely (CTRL, arXiv 1909.05858)."""
    ids = torch.tensor(sorted(set(tokens[-PENALTY_REACH:])), dtype=torch.long)
    seen = logits_V[ids]
    return logits_V.index_copy(0, ids, torch.where(seen > 0, seen / penalty, seen * penalty))


def keep_top_k(prob: Floats, k: int) -> Floats:
    """`prob` is sorted, largest first."""
    return prob[:k] if k else prob


def keep_top_p(prob: Floats, p: float) -> Floats:
    """The fewest tokens that hold at least p of the probability, the first at least."""
    return prob[: int(np.searchsorted(np.cumsum(prob) / prob.sum(), p)) + 1] if p < 1 else prob


def keep_min_p(prob: Floats, p: float) -> Floats:
    """Tokens at least p times as likely as the likeliest."""
    return prob[: int(np.count_nonzero(prob >= p * prob[0]))]


def draw(logits_V: Tensor, options: Options, random: np.random.Generator) -> int:
    """Cut at temperature 1 (top-k, top-p, min-p), then draw at the temperature."""
    logits = logits_V.double().numpy()
    count = min(options.top_k or len(logits), len(logits))
    part = np.argpartition(-logits, count - 1)[:count]
    order = part[np.lexsort((part, -logits[part]))]  # ties by id, so that a seed is enough
    prob = np.exp(logits[order] - logits[order[0]])
    prob = keep_min_p(keep_top_p(keep_top_k(prob, options.top_k), options.top_p), options.min_p)
    tempered = prob ** (1 / options.temperature)
    place = np.searchsorted(np.cumsum(tempered), random.random() * tempered.sum(), side="right")
    return int(order[min(int(place), len(prob) - 1)])


def picker(options: Options, seed: int) -> Pick:
    """The pick function of one sequence."""
    random = np.random.Generator(np.random.PCG64(seed))

    def pick(logits_V: Tensor, tokens: Sequence[int]) -> int:
        if options.repeat_penalty != 1.0:
            logits_V = penalize(logits_V, tokens, options.repeat_penalty)
        if options.temperature == 0:
            return greedy(logits_V, tokens)
        return draw(logits_V, options, random)

    return pick


def seeded(options: Options) -> Options:
    """With the seed that will be used, so that a result states it."""
    if options.seed is not None:
        return options
    return options.with_changes({"seed": int(torch.seed() & 0x7FFFFFFF)})
