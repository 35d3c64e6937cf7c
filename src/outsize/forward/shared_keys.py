"""Layers that share keys and values: of a prompt they see only what is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from outsize.forward.groups import Pair, Steps, added, chunks
from outsize.forward.span import NARROW
from outsize.kernels.rows import Segment
from outsize.model.step import Step, TokenInputs
from outsize.model.transformer import Transformer

Inputs = Callable[[slice], TokenInputs | None]  # what tokens bring, for some rows


def last_steps(
    model: Transformer, pairs: Sequence[Pair], steps: Steps, inputs: Inputs
) -> Iterator[tuple[slice, Step]]:
    """The steps of layers that share keys and values, which store nothing: of a long span only the rows whose
    logits are wanted, since nothing reads the others. Before any layer has run."""
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
            more = list(added([segment], [span]))
            yield rows, model.step([segment], wide, more, (), inputs(rows))
            start = rows.stop
