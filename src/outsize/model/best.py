"""The largest of a row's logits, found without sorting all of them."""

from __future__ import annotations

from torch import Tensor

REFINED = 64  # tokens of the highest logits, which are computed again in fp32


def best(row_V: Tensor) -> Tensor:
    """Ids of the REFINED largest logits: the best blocks first, then the best in those."""
    whole = len(row_V) // REFINED * REFINED
    blocks = row_V[:whole].view(-1, REFINED)
    if len(blocks) <= REFINED:
        return row_V.topk(min(REFINED, len(row_V))).indices
    chosen = blocks.amax(1).topk(REFINED).indices
    found = blocks[chosen].flatten().topk(REFINED).indices
    return chosen[found // REFINED] * REFINED + found % REFINED
