"""What lets a layer's tokens know of each other."""

from __future__ import annotations

from outsize.model.attention import Attention
from outsize.model.conv import ShortConv
from outsize.model.delta import DeltaAttention
from outsize.model.latent import LatentAttention
from outsize.model.norms import Body
from outsize.model_config import Description
from outsize.storage.table import Weights


def mixer(d: Description, index: int, w: Weights) -> Body:
    """A layer's attention, or what stands in its place, over weights in memory."""
    if d.layers[index].mixer == "delta":
        return DeltaAttention(d, index, w)
    if d.layers[index].mixer == "conv":
        return ShortConv(d, index, w)
    return Attention(d, index, w) if d.latent is None else LatentAttention(d, index, w)
