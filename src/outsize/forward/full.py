"""The plain pass: every token of every span through every block. All other passes are held to it.

It goes part by part (attention, feed-forward, attention, ...), each over all tokens of all spans, so that a
part's weights are fetched once, however long the prompt or large the batch. Within a part, spans of up to
NARROW tokens run as one ragged batch through kernels whose rows do not see each other; a longer span runs
alone, CHUNK tokens at a time, as one matmul a weight. So a token's bits never depend on company, and
scratch never grows with the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from outsize.cache.kv import KV
from outsize.forward.span import Out, Span
from outsize.model.attention import CHUNK
from outsize.model.step import Segment, Step
from outsize.model.transformer import Transformer

NARROW = 16

Pair = tuple[Span, KV]


@torch.inference_mode()
def full(model: Transformer, spans: Sequence[Span], kvs: Sequence[KV]) -> list[Out]:
    """One step of a ragged batch. Appends to the caches."""
    rows = hidden(model, list(zip(spans, kvs, strict=True)))
    wanted = [h[len(h) - span.want :] for h, span in zip(rows, spans, strict=True)]
    logits = model.logits(torch.cat(wanted))
    return [Out(part) for part in logits.split([span.want for span in spans])]


def hidden(model: Transformer, pairs: Sequence[Pair]) -> list[Tensor]:
    """For each span (T, D) fp32: the residual stream after the last block, for all its tokens."""
    for span, kv in pairs:
        kv.truncate(span.start)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0].tokens) <= NARROW)
    ordered = [pairs[i] for i in order]
    h_TD = model.embed([token for span, _ in ordered for token in span.tokens])
    steps, at = [], 0
    for segments, wide in _groups(ordered):
        end = at + sum(s.length for s in segments)
        steps.append((slice(at, end), model.step(segments, wide)))
        at = end
    _run(model, h_TD, steps)
    rows = h_TD.split([len(span.tokens) for span, _ in ordered])
    return [h for _, h in sorted(zip(order, rows, strict=True), key=lambda item: item[0])]


def _run(model: Transformer, h_TD: Tensor, steps: Sequence[tuple[slice, Step]]) -> None:
    chunks = [(h_TD[rows], step) for rows, step in steps]
    is_long = any(step.wide for _, step in steps)
    for part in model.parts:
        part(chunks)
        if is_long:
            model.tidy()
    model.end_pass()


def _groups(pairs: Sequence[Pair]) -> Iterator[tuple[list[Segment], bool]]:
    """What runs together, and whether as matmuls: long spans in chunks, then all short ones."""
    short = []
    for span, kv in pairs:
        if len(span.tokens) <= NARROW:
            short.append(Segment(kv, span.positions))
            continue
        for start in range(0, len(span.tokens), CHUNK):
            yield [Segment(kv, span.positions[start : start + CHUNK])], True
    if short:
        yield short, False
