"""Which rows of a pass run together: long spans cut at multiples of the chunk, rows that adapters add to, and
the few rows that layers which share keys and values compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from outsize.forward.span import NARROW, Span
from outsize.kernels.rows import Segment
from outsize.kv.kv import KV
from outsize.model.lora import Adapter
from outsize.model.step import Step
from outsize.model.transformer import Transformer

Pair = tuple[Span, KV]
Steps = Sequence[tuple[slice, Step]]  # rows of a pass, and their step


def last_steps(
    model: Transformer, pairs: Sequence[Pair], steps: Steps
) -> Iterator[tuple[slice, Step]]:
    """The steps of layers that share keys and values, which store nothing: of a long span only the rows whose
    logits are wanted, since nothing reads the others."""
    d = model.description
    if d.num_kv_layers == d.num_layers:
        return
    end = 0
    for span, kv in pairs:
        if span.is_narrow:
            yield steps[-1]  # all short spans: they are the last ones, and one step
            return
        end += span.num_rows
        start = end - span.want
        for positions in chunks(span.positions[len(span.tokens) - span.want :], model.chunk):
            rows, segment = slice(start, start + len(positions)), Segment(kv, positions)
            wide = len(positions) > NARROW
            yield rows, model.step([segment], wide, list(added([segment], [span])))
            start = rows.stop


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


def chunks(positions: range, chunk: int) -> Iterator[range]:
    """Positions in a row, cut at multiples of `chunk`."""
    start = positions.start
    while start < positions.stop:
        end = min(positions.stop, (start // chunk + 1) * chunk)
        yield range(start, end)
        start = end
