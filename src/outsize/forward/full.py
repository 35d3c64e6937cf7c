"""The full forward pass: every token of every span through every layer. All other passes are held to it.

It runs one sub-layer after another (attention, feed-forward, attention, ...), each over all tokens of all
spans, so that a sub-layer's weights are fetched once, however long the prompt or large the batch. Within a
sub-layer, spans of up to NARROW tokens run as one ragged batch through kernels that compute each row as if
alone; a longer span runs by itself as one matmul a weight, cut where positions are multiples of the model's
`chunk`. So a token's bits never depend on what else is in the batch, nor on where a prompt was cut into
several spans, if those end on multiples of `chunk`; and scratch memory never grows with the prompt.

Shapes: T tokens, D model width, K tokens whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from outsize.forward.groups import Pair, Steps, added, groups, wanted
from outsize.forward.inputs import embedded, token_inputs
from outsize.forward.shared_keys import last_steps
from outsize.forward.span import Out, Span, widths
from outsize.kv.kv import KV
from outsize.model.step import Step
from outsize.model.transformer import Transformer


@torch.inference_mode()
def full(model: Transformer, spans: Sequence[Span], kvs: Sequence[KV]) -> list[Out]:
    """The `Forward` that computes everything: one step of a ragged batch. Appends to the caches."""
    return outs(model, spans, hidden(model, list(zip(spans, kvs, strict=True))))


def outs(model: Transformer, spans: Sequence[Span], rows: Sequence[Tensor]) -> list[Out]:
    """What spans are sent back, of the residual streams of their last tokens and masks."""
    ends = [len(h) - span.num_masks for h, span in zip(rows, spans, strict=True)]
    wanted = [h[e - s.want : e] for h, e, s in zip(rows, ends, spans, strict=True)]
    counts, states_KD = [span.want for span in spans], model.normed(torch.cat(wanted))
    logits = model.project(states_KD).split(counts)
    masks = [
        None if s.masks is None else model.normed(h[e:])
        for h, e, s in zip(rows, ends, spans, strict=True)
    ]
    return [Out(*each) for each in zip(logits, masks, states_KD.split(counts), strict=True)]


def hidden(model: Transformer, pairs: Sequence[Pair]) -> list[Tensor]:
    """For each span (T, D) fp32: the residual stream after the last block, for all its tokens (where layers
    share keys and values, or other ranks have the last ones: for those whose logits are wanted)."""
    for span, kv in pairs:
        kv.truncate(span.start)
    order = sorted(range(len(pairs)), key=lambda i: pairs[i][0].is_narrow)
    ordered = [pairs[i] for i in order]
    inputs = token_inputs(model, [token for span, _ in ordered for token in span.tokens])
    h_TD = embedded(model, [span for span, _ in ordered])
    steps, at = list[tuple[slice, Step]](), 0
    for segments, wide, spans in groups(ordered, model.chunk):
        end = at + sum(s.length for s in segments)
        rows, more = slice(at, end), list(added(segments, spans))
        made = model.step(segments, wide, more, (), inputs(h_TD, rows))
        steps.append((rows, replace(made, widths=list(widths(segments, spans)))))
        at = end
    last = [*last_steps(model, ordered, steps, partial(inputs, h_TD))]
    model.begin(len(pairs) > 1 or not pairs[0][0].is_narrow)
    with model.leader.step(pairs) if model.leader is not None else nullcontext():
        if model.relay is None:
            _run(model, h_TD, steps, last)
        else:
            chunks = [(h_TD[rows], step) for rows, step in steps]
            model.relay.run(model.paged_layers, chunks, [*wanted(ordered, steps)])
        model.memory.end_pass()
    rows = h_TD.split([span.num_rows for span, _ in ordered])
    return [h for _, h in sorted(zip(order, rows, strict=True), key=lambda item: item[0])]


def _run(model: Transformer, h_TD: Tensor, steps: Steps, last: Steps) -> None:
    """All sub-layers, in order, each over all chunks of rows; those of layers that share keys and values over
    the `last` ones. Changes h_TD."""
    chunks = [(h_TD[rows], step) for rows, step in steps]
    is_long = any(step.wide for _, step in steps)
    makes_keys = 2 * model.description.num_kv_layers
    for number, layer in enumerate(model.paged_layers):
        if number == makes_keys:
            chunks = [(h_TD[rows], step) for rows, step in last]
        layer(chunks)
        if is_long:
            model.memory.trim()
