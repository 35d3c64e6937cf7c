"""How likely a model holds each token of a text to be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from outsize.forward.full import hidden
from outsize.forward.groups import chunks
from outsize.forward.span import Span
from outsize.kv.kv import KV
from outsize.model.transformer import Transformer
from outsize.model.width import Width
from outsize.sampling.logprobs import TokenLogprob

ROWS, BYTES = 64, 8 << 20  # logits computed at once


class Scored(NamedTuple):
    """A token's log-probability, and whether the token was the likeliest."""

    token: TokenLogprob
    is_likeliest: bool


def scored(
    model: Transformer, tokens: Sequence[int], top: int = 0, width: Width | None = None
) -> Iterator[list[Scored]]:
    """Of every token after the first, with the `top` likeliest in its place: chunk by chunk of the text, so
    that others may have a step between two."""
    kv = model.new_kv(len(tokens))
    for part in chunks(range(len(tokens) - 1), model.chunk):
        targets = tokens[part.start + 1 : part.stop + 1]
        some = tokens[part.start : part.stop]
        span = Span(part.start, some, len(some), width=width)
        yield _chunk(model, span, kv, targets, top)


@torch.inference_mode()
def _chunk(
    model: Transformer, span: Span, kv: KV, targets: Sequence[int], top: int
) -> list[Scored]:
    """Of the tokens after those of a span."""
    (h_TD,) = hidden(model, [(span, kv)])
    step, out = max(1, min(ROWS, BYTES // (4 * model.description.vocab_size))), list[Scored]()
    for start in range(0, len(targets), step):
        some = torch.tensor(targets[start : start + step], dtype=torch.int64, device="cpu")
        out += _rows(model.logits(h_TD[start : start + len(some)]), some, top)
    return out


def _rows(logits_TV: Tensor, targets_T: Tensor, top: int) -> Iterator[Scored]:
    logs_TV = torch.log_softmax(logits_TV, dim=1)
    own = logs_TV.gather(1, targets_T[:, None])[:, 0].tolist()
    likeliest = (logits_TV.argmax(1) == targets_T).tolist()
    best = logs_TV.topk(min(top, logs_TV.shape[1]), dim=1)
    ids, values = best.indices.tolist(), best.values.tolist()
    for row, (token, logprob) in enumerate(zip(targets_T.tolist(), own, strict=True)):
        pairs = tuple(zip(ids[row], values[row], strict=True))
        yield Scored(TokenLogprob(token, logprob, pairs), likeliest[row])
