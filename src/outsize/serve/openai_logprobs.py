"""Log-probabilities as OpenAI's two endpoints write them."""

from __future__ import annotations

import codecs
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
    """A control token has no bytes."""
    raw = token_bytes(model, token)
    return {
        "token": token_text(model, token),
        "logprob": max(LEAST, value),
        "bytes": list(raw) if raw else None,
    }


class TextLogprobs:
    """Of one choice of a text completion, as its tokens come: lists beside one another."""

    def __init__(self, model: Model) -> None:
        self._model, self._characters = model, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
        """Of some more tokens. The first of a text has no log-probability: NaN here, null there."""
        made: dict[str, list[Any]] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
        }  # fmt: skip
        for token in tokens:
            text, is_first = token_text(self._model, token.token), math.isnan(token.logprob)
            value = max(LEAST, token.logprob)
            top = {token_text(self._model, i): max(LEAST, v) for i, v in token.top}
            made["tokens"].append(text)
            made["token_logprobs"].append(None if is_first else value)
            made["top_logprobs"].append(None if is_first else {text: value} | top)
            made["text_offset"].append(self._characters)
            self._characters += len(self._decoder.decode(token_bytes(self._model, token.token)))
        return made
