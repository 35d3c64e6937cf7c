"""Log-probabilities as OpenAI's two endpoints write them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from outsize.engine.model import Model
from outsize.sampling.logprobs import TokenLogprob

LEAST = -9999.0  # in place of minus infinity, which JSON has not


def chat_logprobs(tokens: Iterable[TokenLogprob], model: Model) -> list[dict[str, Any]]:
    """Of a chat: each token as text and as bytes, which joined give the reply's."""
    return [
        {
            **_one(token.token, token.logprob, model),
            "top_logprobs": [_one(i, value, model) for i, value in token.top],
        }
        for token in tokens
    ]


def _one(token: int, value: float, model: Model) -> dict[str, Any]:
    raw = token_bytes(model, token)
    return {"token": raw.decode("utf-8", "replace"), "logprob": finite(value), "bytes": list(raw)}


def finite(value: float) -> float:
    return max(LEAST, value)


def token_bytes(model: Model, token: int) -> bytes:
    return model.tokens.decode([token]).encode()
