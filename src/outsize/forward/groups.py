"""Which rows of a pass run together, and in what pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from outsize.forward.span import NARROW, Span
from outsize.kernels.rows import Segment
from outsize.kv.kv import KV
from outsize.model.lora import Adapter
from outsize.model.step import Step

Pair = tuple[Span, KV]
Steps = Sequence[tuple[slice, Step]]  # rows of a pass, and their step


def groups(pairs: Sequence[Pair], chunk: int) -> Iterator[tuple[list[Segment], bool, list[Span]]]:
    """What runs together, and whether it is wide: each long span in chunks, then all short ones at once. A
    chunk of few tokens, as a prompt's last may be, is not wide either: its bits are those of a short span."""
    short, spans = [], []
    for span, kv in pairs:
        if span.is_narrow:
            masks = span.masks
            blocks = () if masks is None else (masks.anchors, len(masks.rows_KD))
            short.append(Segment(kv, span.positions, *blocks))
            spans.append(span)
            continue
        for positions in chunks(span.positions, chunk):
            yield [Segment(kv, positions)], len(positions) > NARROW, [span]
    if short:
        yield short, False, spans


def chunks(positions: range, chunk: int) -> Iterator[range]:
    """Positions in a row, cut at multiples of `chunk`."""
    start = positions.start
    while start < positions.stop:
        end = min(positions.stop, (start // chunk + 1) * chunk)
        yield range(start, end)
        start = end


def added(segments: Sequence[Segment], spans: Sequence[Span]) -> Iterator[tuple[slice, Adapter]]:
    """Which rows of a step an adapter adds to: all of a span's by its own, its mask tokens' by theirs."""
    at = 0
    for segment, span in zip(segments, spans, strict=True):
        end = at + segment.length
        if span.adapter is not None:
            yield slice(at, end), span.adapter
        if span.masks is not None and segment.num_masks:
            yield slice(end - segment.num_masks, end), span.masks.adapter
        at = end


def wanted(pairs: Sequence[Pair], steps: Steps) -> Iterator[list[slice]]:
    """Of each step the rows, numbered within it, whose logits are wanted."""
    ends, end = list[range](), 0
    for span, _ in pairs:
        end += span.num_rows
        last = end - span.num_masks
        ends.append(range(last - span.want, last))
    for rows, _ in steps:
        both = [(max(r.start, rows.start), min(r.stop, rows.stop)) for r in ends]
        yield [slice(a - rows.start, b - rows.start) for a, b in both if a < b]
