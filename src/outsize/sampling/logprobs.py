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
    """Of one token, with the `count` likeliest; of equals, those of the lower id first."""
    logs_V = logits_V.double().log_softmax(0)
    values, ids = logs_V.sort(descending=True, stable=True) if count else (logs_V[:0], logs_V[:0])
    top = zip(ids[:count].tolist(), values[:count].tolist(), strict=True)
    return TokenLogprob(token, float(logs_V[token]), tuple((int(i), float(v)) for i, v in top))
