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

from outsize.forward.span import Out, Span
from outsize.kernels.attention import CHUNK
from outsize.kernels.rows import Segment
from outsize.kv.kv import KV
from outsize.model.lora import Adapter
from outsize.model.step import Step
from outsize.model.transformer import Transformer

NARROW = 16

Pair = tuple[Span, KV]


@torch.inference_mode()
def full(model: Transformer, spans: Sequence[Span], kvs: Sequence[KV]) -> list[Out]:
    """One step of a ragged batch. Appends to the caches."""
    rows = hidden(model, list(zip(spans, kvs, strict=True)))
    ends = [len(span.tokens) for span in spans]
    wanted = [h[e - s.want : e] for h, e, s in zip(rows, ends, spans, strict=True)]
    logits = model.logits(torch.cat(wanted)).split([span.want for span in spans])
    masks = [
        None if s.masks is None else model.normed(h[e:])
        for h, e, s in zip(rows, ends, spans, strict=True)
    ]
    return [Out(*pair) for pair in zip(logits, masks, strict=True)]


def hidden(model: Transformer, pairs: Sequence[Pair]) -> list[Tensor]:
    """For each span (T, D) fp32: the residual stream after the last block, for all its tokens."""
    for span, kv in pairs:
        kv.truncate(span.start)
    order = sorted(range(len(pairs)), key=lambda i: is_narrow(pairs[i][0]))
    ordered = [pairs[i] for i in order]
    h_TD = _embedded(model, [span for span, _ in ordered])
    steps, at = [], 0
    for segments, wide, spans in _groups(ordered):
        end = at + sum(s.length for s in segments)
        steps.append((slice(at, end), model.step(segments, wide, list(_added(segments, spans)))))
        at = end
    model.begin(len(pairs) > 1 or not is_narrow(pairs[0][0]))
    _run(model, h_TD, steps)
    rows = h_TD.split([span.num_rows for span, _ in ordered])
    return [h for _, h in sorted(zip(order, rows, strict=True), key=lambda item: item[0])]


def is_narrow(span: Span) -> bool:
    """Does it run through kernels whose rows do not see each other? What is drafted always does."""
    return len(span.tokens) <= NARROW or span.masks is not None


def _embedded(model: Transformer, spans: Sequence[Span]) -> Tensor:
    """Of each span, its tokens, then the masks of every block. Tokens are looked up all at once."""
    h_TD = model.embed([token for span in spans for token in span.tokens])
    if all(span.masks is None for span in spans):
        return h_TD
    parts: list[Tensor] = []
    for span, h in zip(spans, h_TD.split([len(span.tokens) for span in spans]), strict=True):
        parts.append(h)
        if span.masks is not None:
            parts.append(span.masks.rows_KD.repeat(len(span.masks.anchors), 1))
    return torch.cat(parts)


def _added(segments: Sequence[Segment], spans: Sequence[Span]) -> Iterator[tuple[slice, Adapter]]:
    """Which rows of a step have something added: all of a span's by its adapter, its masks by theirs."""
    at = 0
    for segment, span in zip(segments, spans, strict=True):
        end = at + segment.length
        if span.adapter is not None:
            yield slice(at, end), span.adapter
        if span.masks is not None and segment.num_masks:
            yield slice(end - segment.num_masks, end), span.masks.adapter
        at = end


def _run(model: Transformer, h_TD: Tensor, steps: Sequence[tuple[slice, Step]]) -> None:
    chunks = [(h_TD[rows], step) for rows, step in steps]
    is_long = any(step.wide for _, step in steps)
    for part in model.paged_layers:
        part(chunks)
        if is_long:
            model.tidy()
    model.end_pass()


def _groups(pairs: Sequence[Pair]) -> Iterator[tuple[list[Segment], bool, list[Span]]]:
    """What runs together, and whether as matmuls: long spans in chunks, then all short ones."""
    short, spans = [], []
    for span, kv in pairs:
        if is_narrow(span):
            masks = span.masks
            blocks = () if masks is None else (masks.anchors, len(masks.rows_KD))
            short.append(Segment(kv, span.positions, *blocks))
            spans.append(span)
            continue
        for start in range(0, len(span.tokens), CHUNK):
            yield [Segment(kv, span.positions[start : start + CHUNK])], True, [span]
    if short:
        yield short, False, spans
