"""The log-probability of a token, and of the likeliest in its place."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its log-probability in nats by the model's own logits (before penalties, bias and
    temperature), and the likeliest tokens of that place with theirs, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def logprob_of(logits_V: Tensor, token: int, count: int) -> TokenLogprob:
    """Of one token, with the `count` likeliest."""
    logs_V = logits_V.double().log_softmax(0)
    best = logs_V.topk(min(count, len(logs_V)))
    top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return TokenLogprob(token, float(logs_V[token]), tuple((int(i), float(v)) for i, v in top))
