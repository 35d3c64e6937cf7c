"""A model's logits over spans of some text: a prompt, single tokens, and a few at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.model.transformer import Transformer
from tests.golden import tiny

SPANS = [[0, 30], [30, 31], [31, 32], [32, 36], [36, 37], [37, 38]]


def logits(model: Transformer, spans: Sequence[Sequence[int]] = SPANS) -> Tensor:
    kv, rows = model.new_kv(), []
    for first, last in spans:
        (out,) = full(model, [Span(first, tiny.TOKENS[first:last], last - first)], [kv])
        rows.append(out.logits_KV)
    return torch.cat(rows)
