"""Long prompts in slices: a span is cut into two that give the same bits, so that a step need not run all of
it (chunked prefill, arXiv 2308.16369).

Law: slices that end on multiples of the model's `chunk` give the bits of the whole (forward/full.py).
"""

from __future__ import annotations

from dataclasses import replace

from outsize.forward.span import Span


def split(span: Span, most: int, chunk: int) -> tuple[Span, Span | None]:
    """The first part of a span, of at most `most` tokens but at least to the next multiple of `chunk`; and
    the rest, if there is one. Only the last part gives logits."""
    end = max(span.start + most, (span.start // chunk + 1) * chunk) // chunk * chunk
    size = end - span.start
    if (
        span.is_narrow or span.is_lazy or size >= len(span.tokens)
    ):  # who goes on is chosen once for all
        return span, None
    first = replace(span, tokens=span.tokens[:size], want=0)
    return first, replace(span, start=end, tokens=span.tokens[size:])
