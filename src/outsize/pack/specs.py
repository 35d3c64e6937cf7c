"""Tensors of records that models of LayerNorms and two-matrix feed-forwards have otherwise."""

from __future__ import annotations

from outsize.model_config import Description
from outsize.pack.records import TensorSpec, matrix, vector


def norms(d: Description, name: str) -> dict[str, TensorSpec]:
    """A norm's weight, and its bias."""
    names = (name, f"{name}_bias") if d.layer_norm else (name,)
    return {n: vector((n, d.width)) for n in names}


def ffn_norm(d: Description) -> dict[str, TensorSpec]:
    """None where the feed-forward reads what attention reads."""
    return norms(d, "ffn_norm") if d.pre_norm and not d.parallel else {}


def two_matrix(d: Description) -> dict[str, TensorSpec]:
    """A feed-forward of two matrices: what is called `gate_up` is up alone."""
    specs = {
        "gate_up": matrix(d.width, ("up", d.ffn_width)),
        "down": matrix(d.ffn_width, ("down", d.width)),
    }
    if d.mlp_bias:
        specs["gate_up_bias"] = vector(("up_bias", d.ffn_width))
        specs["down_bias"] = vector(("down_bias", d.width))
    return specs
