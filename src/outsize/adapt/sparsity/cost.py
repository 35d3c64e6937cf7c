"""What computing only some neurons costs: a held-out text's perplexity, run as decoding runs it, in spans
of few tokens, with the engine that will run it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from outsize.engine.model import Model
from outsize.forward.full import full
from outsize.forward.span import NARROW, Span
from outsize.progress import Progress

MOST = 4  # sequences


@torch.inference_mode()
def perplexity(model: Model, ids_BT: Tensor, what: str, progress: Progress) -> tuple[float, int]:
    """Of the first sequences, and how many tokens were predicted."""
    loss, count, some = 0.0, 0, ids_BT[:MOST]
    for number, ids in enumerate(some):
        progress(what, number, len(some))
        more, tokens = _one(model, ids.tolist())
        loss, count = loss + more, count + tokens
    return math.exp(loss / max(1, count)), count


def _one(model: Model, ids: list[int]) -> tuple[float, int]:
    """Summed loss of a sequence's tokens after the first."""
    transformer, loss = model.transformer, 0.0
    kv = transformer.new_kv(len(ids))
    for at in range(0, len(ids) - 1, NARROW):
        tokens = ids[at : min(at + NARROW, len(ids) - 1)]
        (out,) = full(transformer, [Span(at, tokens, len(tokens))], [kv])
        target = torch.tensor(ids[at + 1 : at + 1 + len(tokens)])
        loss += float(cross_entropy(out.logits_KV, target, reduction="sum"))
    return loss, len(ids) - 1
