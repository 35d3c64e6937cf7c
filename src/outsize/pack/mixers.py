"""Tensors of what some layers have in place of attention."""

from __future__ import annotations

from outsize.model_config import Description
from outsize.model_parts import Delta
from outsize.pack.records import Specs, matrix, vector


def delta_specs(d: Description, x: Delta) -> Specs:
    """The gated delta rule: maps of queries, keys, values and what gates the sums; of each value head's decay
    and step; the convolution, channel by channel; the norm of a head."""
    heads, channels = x.value_heads, 2 * x.keys + x.values
    inputs = (("delta_q", x.keys), ("delta_k", x.keys), ("delta_v", x.values))
    return {
        "attn_norm": vector(("attn_norm", d.width)),
        "delta_qkvz": matrix(d.width, *inputs, ("delta_z", x.values)),
        "delta_gates": matrix(d.width, ("delta_b", heads), ("delta_a", heads)),
        "delta_conv": vector(("delta_conv", channels * x.kernel)),
        "delta_decay": vector(("delta_decay", heads)),
        "delta_shift": vector(("delta_shift", heads)),
        "delta_gain": vector(("delta_gain", x.value)),
        "o": matrix(x.values, ("delta_o", d.width)),
    }


def conv_specs(d: Description) -> Specs:
    """A short convolution, gated before and after: three maps as one, and each channel's weights."""
    return {
        "attn_norm": vector(("attn_norm", d.width)),
        "conv_in": matrix(d.width, ("conv_in", 3 * d.width)),
        "conv_taps": vector(("conv_taps", d.width * d.kernel)),
        "o": matrix(d.width, ("conv_o", d.width)),
    }
