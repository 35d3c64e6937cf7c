"""What a pass's tokens bring to the layers that read them: embeddings, or rows of a table on their way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from outsize.model.step import TokenInputs
from outsize.model.transformer import Transformer


def token_inputs(
    model: Transformer, tokens: Sequence[int]
) -> Callable[[Tensor, slice], TokenInputs | None]:
    """Of a model whose layers read their tokens: their embeddings, or rows of a table, for some rows of a
    step. Begins to read the table. Mask tokens have no row there: such a model is given none."""
    if model.description.memory is None:
        return lambda h_TD, rows: None
    recall = model.recall(tokens)
    if recall is None:
        return lambda h_TD, rows: TokenInputs(h_TD[rows].clone())
    return lambda h_TD, rows: TokenInputs(None, recall.part(rows))
