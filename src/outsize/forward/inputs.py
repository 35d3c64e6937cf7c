"""What a pass's tokens bring: their embeddings, with what a model has learned of their positions; and to the
layers that read them, embeddings, or rows of a table on their way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from outsize.forward.span import Span
from outsize.model.step import TokenInputs
from outsize.model.transformer import Transformer


def token_inputs(
    model: Transformer, tokens: Sequence[int]
) -> Callable[[Tensor, slice], TokenInputs | None]:
    """Of a model whose layers read their tokens: their embeddings, rows of a table, or both, for some rows of
    a step. Begins to read the table. Mask tokens have no row there: such a model is given none."""
    d = model.description
    if not d.reads_tokens:
        return lambda h_TD, rows: None
    recall = None if model.loaded.tokens is None else model.loaded.tokens.ask(tokens)
    if recall is None:
        return lambda h_TD, rows: TokenInputs(h_TD[rows].clone())
    if not d.token_width:
        return lambda h_TD, rows: TokenInputs(None, recall.part(rows))
    return lambda h_TD, rows: TokenInputs(h_TD[rows].clone(), recall.part(rows))


def embedded(model: Transformer, spans: Sequence[Span]) -> Tensor:
    """(T, D) fp32: of each span, its tokens' rows of the embedding (all looked up at once), then its mask
    tokens' own, block by block."""
    h_TD = model.embed([token for span in spans for token in span.tokens])
    if model.positions_PD is not None:
        h_TD.add_(model.positions_PD[[p for span in spans for p in span.positions]])
    if all(span.masks is None for span in spans):
        return h_TD
    rows: list[Tensor] = []
    for span, h in zip(spans, h_TD.split([len(span.tokens) for span in spans]), strict=True):
        rows.append(h)
        if span.masks is not None:
            rows.append(span.masks.rows_KD.repeat(len(span.masks.anchors), 1))
    return torch.cat(rows)
