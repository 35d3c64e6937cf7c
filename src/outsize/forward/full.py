"""The plain pass: every token of every span through every block. All other passes are held to it.

Spans of up to NARROW tokens run as one ragged batch through kernels whose rows do not see each other.
A longer span runs alone, as one matmul a weight. So a token's bits never depend on company.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from outsize.cache.kv import KV
from outsize.forward.span import Out, Span
from outsize.model.transformer import Segment, Transformer

NARROW = 16


@torch.inference_mode()
def full(model: Transformer, spans: Sequence[Span], kvs: Sequence[KV]) -> list[Out]:
    """One step of a ragged batch. Appends to the caches."""
    pairs = list(zip(spans, kvs, strict=True))
    short = [i for i, span in enumerate(spans) if len(span.tokens) <= NARROW]
    groups = [[i] for i in range(len(spans)) if i not in set(short)] + ([short] if short else [])
    outs: dict[int, Out] = {}
    for group in groups:
        outs |= zip(group, _run(model, [pairs[i] for i in group]), strict=True)
    return [outs[i] for i in range(len(spans))]


def _run(model: Transformer, pairs: Sequence[tuple[Span, KV]]) -> list[Out]:
    h_TD = hidden(model, pairs)
    ends = torch.tensor([len(span.tokens) for span, _ in pairs]).cumsum(0).tolist()
    wanted = [h_TD[end - span.want : end] for (span, _), end in zip(pairs, ends, strict=True)]
    logits = model.logits(torch.cat(wanted))
    return [Out(rows) for rows in logits.split([span.want for span, _ in pairs])]


def hidden(model: Transformer, pairs: Sequence[tuple[Span, KV]]) -> Tensor:
    """(T, D) fp32: the residual stream after the last block, for all tokens of the spans."""
    for span, kv in pairs:
        kv.truncate(span.start)
    segments = [Segment(kv, span.positions) for span, kv in pairs]
    wide = max(segment.length for segment in segments) > NARROW
    step = model.step(segments, wide)
    h_TD = model.embed([token for span, _ in pairs for token in span.tokens])
    for block in model.blocks:
        block(h_TD, step)
    return h_TD
