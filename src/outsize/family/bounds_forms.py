"""Bounds of what few models have: layers of two sizes, what layers read of their tokens, a dense feed-forward
beside the experts."""

from __future__ import annotations

from outsize.family.config import LIMITS, MOST_HEAD
from outsize.model_config import Description, Mixture

MOST_TOKEN = 1 << 16  # numbers of a token in a layer


def forms_fault(d: Description) -> str:
    """What is wrong with the sizes of a description's layers, in a clause; "" if nothing is."""
    if problem := _sizes_fault(d):
        return problem
    if not 0 <= d.token_width <= MOST_TOKEN:
        return f"layers read {d.token_width:,} numbers of a token, 0 to {MOST_TOKEN:,} are known"
    is_mixed = d.mixture is not None and not d.mixture.beside
    rare = d.memory or d.shard or d.further or d.parallel or d.two_matrix or is_mixed
    if (d.token_width or d.out_scale) and rare:
        return "layers that read their tokens, or are scaled, in a model of another kind"
    if d.token_width and (d.mixture is not None or not d.post_norm):
        return "layers that read their tokens have no experts, and norms after each part"
    if d.value_norm and (d.qkv_bias or d.latent or d.shard or d.has_states or d.parallel):
        return "values are normed beside biases, parts, latents or states"
    return ""


def _sizes_fault(d: Description) -> str:
    for name, values in zip(
        ("head_dim", "num_kv_heads", "ffn_width"),
        zip(*(x.form for x in d.layers), strict=True),
        strict=True,
    ):
        if len({*values} - {0}) > 1 or min(values) < 0:
            return f"{name} has more sizes than two"
    if all(x.form == (0, 0, 0) for x in d.layers):
        return ""
    for form in d.forms:
        heads = form.num_kv_heads
        if not 0 < form.head_dim <= MOST_HEAD or form.head_dim % 2 or form.ffn_width > 1 << 24:
            return (
                f"a layer has heads of {form.head_dim:,} numbers and a width of {form.ffn_width:,}"
            )
        if not 0 < heads <= LIMITS["num_key_value_heads"] or form.num_heads % heads:
            return f"a layer has {form.num_heads} heads over {heads:,} key heads, which must divide evenly"
    if not any(not any(d.layers[i].form[:2]) for i in d.kv_layers):
        return "no layer has the model's own sizes"
    sizes = {(x.rope, x.head_dim or d.head_dim) for x in d.layers}
    if len(sizes) > len(d.ropes):
        return "one rope turns heads of two sizes"
    others = (
        d.latent or d.delta or d.shard or d.memory or d.sinks or d.gated or d.kernel or d.parallel
    )
    if others or (d.mixture is not None and any(x.ffn_width for x in d.layers)):
        return "layers of two sizes in a model of another kind"
    return ""


def beside_fault(d: Description, m: Mixture) -> str:
    """What is wrong with a dense feed-forward beside the experts, in a clause; "" if nothing is."""
    if not m.beside:
        return ""
    rest = Mixture(m.count, m.used, m.width, m.renorm, shared=m.shared, beside=True)
    if m != rest or not m.shared or len(d.routed) != d.num_layers:
        return "experts beside a dense feed-forward are grouped, biased or in some layers alone"
    if not (d.pre_norm and d.post_norm) or d.residual_scale != 1.0:
        return "experts beside a dense feed-forward have norms before and after, and no scale"
    return ""
