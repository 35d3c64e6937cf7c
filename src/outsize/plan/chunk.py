"""How many tokens of a prompt are computed at once where several requests share a model.

A prompt is cut, and shared, at multiples of this (forward/full.py). Large chunks compute faster (on an AMX
machine 256 tokens cost a tenth more than 512, 128 half as much again); small ones let other replies go on
sooner, and more of a prompt be shared.
"""

from __future__ import annotations

from outsize.options import CHUNKS
from outsize.plan.cost import Cost

STALL_S = 0.3  # that other replies may wait for a chunk; or what a step reads from disk, if that is longer
LEAST, UNKNOWN = 64, 256


def best(cost: Cost | None) -> int:
    """The longest chunk that is computed in time, by the prediction for a prompt."""
    if cost is None:
        return UNKNOWN
    token_s = cost.prompt_compute_s / cost.prompt_tokens
    most = max(STALL_S, cost.read_s)
    fitting = [c for c in CHUNKS if c >= LEAST and c * token_s <= most]
    return max(fitting, default=LEAST)
