"""Log-probabilities as OpenAI's two endpoints write them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from outsize.engine.model import Model
from outsize.sampling.logprobs import TokenLogprob
from outsize.serve.token_text import token_bytes, token_text

LEAST = -9999.0  # in place of minus infinity, which JSON has not


def chat_logprobs(tokens: Iterable[TokenLogprob], model: Model) -> list[dict[str, Any]]:
    """Of a chat: each token as text and as bytes, which joined are the reply's."""
    return [
        {
            **_one(token.token, token.logprob, model),
            "top_logprobs": [_one(i, value, model) for i, value in token.top],
        }
        for token in tokens
    ]


def _one(token: int, value: float, model: Model) -> dict[str, Any]:
    raw = token_bytes(model, token)
    return {"token": token_text(raw), "logprob": max(LEAST, value), "bytes": list(raw)}


def text_logprobs(tokens: Iterable[TokenLogprob], offset: int, model: Model) -> dict[str, Any]:
    """Of a text: lists beside one another. `offset`: characters of the text before these tokens. The first
    token of a text has no log-probability: NaN here, null there."""
    made: dict[str, Any] = {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": [],
    }
    seen = b""
    for token in tokens:
        raw = token_bytes(model, token.token)
        made["tokens"].append(token_text(raw))
        made["text_offset"].append(offset + len(seen.decode("utf-8", "ignore")))
        seen += raw
        if math.isnan(token.logprob):
            made["token_logprobs"].append(None)
            made["top_logprobs"].append(None)
            continue
        made["token_logprobs"].append(max(LEAST, token.logprob))
        likeliest = {token_text(token_bytes(model, i)): max(LEAST, v) for i, v in token.top}
        made["top_logprobs"].append({token_text(raw): max(LEAST, token.logprob)} | likeliest)
    return made
