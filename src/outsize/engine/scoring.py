"""How likely a model holds each token of a text to be."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from outsize.forward.full import hidden
from outsize.forward.span import Span
from outsize.model.transformer import Transformer

ROWS, BYTES = 64, 8 << 20  # logits computed at once


@torch.inference_mode()
def scored(model: Transformer, tokens: Sequence[int]) -> tuple[list[float], list[bool]]:
    """Of every token after the first: its log-probability, and whether it was the likeliest."""
    logprobs, likeliest = list[float](), list[bool]()
    (h_TD,) = hidden(model, [(Span(0, tokens), model.new_kv(len(tokens)))])
    step = max(1, min(ROWS, BYTES // (4 * model.description.vocab_size)))
    for start in range(0, len(tokens) - 1, step):
        target = torch.tensor(tokens[start + 1 : start + 1 + step], dtype=torch.int64, device="cpu")
        logits = model.logits(h_TD[start : start + len(target)])
        rows = torch.log_softmax(logits, dim=1).gather(1, target[:, None])[:, 0]
        logprobs += rows.tolist()
        likeliest += (logits.argmax(1) == target).tolist()
    return logprobs, likeliest
