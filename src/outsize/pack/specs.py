"""Tensors of records that models of LayerNorms and two-matrix feed-forwards have otherwise."""

from __future__ import annotations

from outsize.model_config import Description, Mixture
from outsize.pack.records import CONTEXT, TensorSpec, matrix, vector

OUT_SCALE = "out_scale"  # what the residual stream is multiplied by at a layer's end


def norms(d: Description, name: str) -> dict[str, TensorSpec]:
    """A norm's weight, and its bias."""
    names = (name, f"{name}_bias") if d.layer_norm else (name,)
    return {n: vector((n, d.width)) for n in names}


def ffn_norm(d: Description) -> dict[str, TensorSpec]:
    """None where the feed-forward reads what attention reads."""
    return norms(d, "ffn_norm") if d.pre_norm and not d.parallel else {}


def layer_end(d: Description) -> dict[str, TensorSpec]:
    """Of a feed-forward's record, what comes behind it: maps of what the layer reads of its tokens, and a
    number."""
    size, specs = d.token_width, dict[str, TensorSpec]()
    if size:
        specs["token_gate"] = matrix(d.width, ("token_gate", size))
        specs["token_down"] = matrix(size, ("token_down", d.width))
        specs[CONTEXT] = matrix(d.width, (CONTEXT, size))
        specs["token_norm"] = vector(("token_norm", size))
        specs["token_post_norm"] = vector(("token_post_norm", d.width))
    return specs | ({OUT_SCALE: vector((OUT_SCALE, 1))} if d.out_scale else {})


def beside(d: Description, m: Mixture) -> dict[str, TensorSpec]:
    """What a router has with a dense feed-forward beside its experts: norms of each, and scales."""
    names = (
        "experts_norm",
        "dense_post_norm",
        "experts_post_norm",
        "ffn_post_norm",
        "router_scale",
    )
    return {n: vector((n, d.width)) for n in names} | {
        "expert_scale": vector(("expert_scale", m.count))
    }


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
