"""What numbers a description may have: bounds within which nothing overflows, divides by nothing or asks
for more than a machine can address. Checkpoints and packs are held to the same."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

from outsize.family.bounds_forms import beside_fault, forms_fault
from outsize.family.config import LIMITS, MOST_HEAD
from outsize.model_config import (
    ACTIVATIONS,
    BIASED,
    MIXERS,
    SCORES,
    THRESHOLD,
    Description,
    Layer,
    Memory,
    Mixture,
)
from outsize.model_parts import Delta, Latent, Shard, orders_fit

MOST = 1 << 24
MOST_KERNEL = 64  # tokens of a short convolution
MOST_RANKS = 64
CUTS = {("gather", "whole"), ("sum", "whole"), ("sum", "heads"), ("layers", "whole")}
WHOLE = {
    "width": MOST, "ffn_width": MOST, "vocab_size": MOST, "context": MOST, "head_dim": MOST_HEAD,
    "num_heads": LIMITS["num_attention_heads"], "num_kv_heads": LIMITS["num_key_value_heads"],
    "num_layers": LIMITS["num_hidden_layers"],
}  # fmt: skip
REAL = {
    "norm_eps": (1e-20, 1.0), "attn_scale": (1e-12, 1e4), "embed_scale": (1e-12, 1e5),
    "residual_scale": (1e-6, 1e4), "logit_scale": (1e-6, 1e6), "logit_cap": (0.0, 1e6),
    "attn_cap": (0.0, 1e6),
}  # fmt: skip
BASE, DIVISOR, SCALE = (1.0, 1e12), (1e-12, 1e31), (1e-6, 1e3)


def fault(d: Description) -> str:
    """What is wrong with a description, in a clause; "" if nothing is."""
    for name, most in WHOLE.items():
        if not 0 < (value := getattr(d, name)) <= most:
            return f"{name} is {value:,}, a whole number from 1 to {most:,} is due"
    for name, (low, high) in REAL.items():
        if problem := _outside(name, getattr(d, name), low, high):
            return problem
    if d.num_heads % d.num_kv_heads or d.head_dim % 2:
        return (
            f"{d.num_heads} heads over {d.num_kv_heads} key heads of {d.head_dim} numbers: heads must "
            "divide evenly and have an even size"
        )
    if d.qk_norm and d.qk_norm_whole:
        return "queries and keys are normed by heads and as a whole: one of the two is due"
    if not (d.pre_norm or d.post_norm):
        return "nothing is normed: norms before or after each half are due"
    if d.parallel and (not d.pre_norm or d.post_norm):
        return "feed-forwards that read what attention reads have a norm before it, and none after"
    is_classic = d.parallel or d.layer_norm or d.positions or d.two_matrix
    if is_classic and (d.mixture or d.memory or d.shard or d.qk_norm or d.qk_norm_whole):
        return (
            "experts, tables, parts or norms of heads in a model of LayerNorms or two-matrix halves"
        )
    if d.layer_norm and d.post_norm:
        return "LayerNorms after each half are not known"
    if problem := _delta_fault(d, d.delta):
        return problem
    if d.latent is not None and (problem := _latent_fault(d, d.latent)):
        return problem
    if problem := _sharing_fault(d):
        return problem
    if d.memory is not None and (problem := _memory_fault(d, d.memory)):
        return problem
    if d.shard is not None and (problem := _shard_fault(d, d.shard)):
        return problem
    if problem := _mixture_fault(d) or forms_fault(d):
        return problem
    each = ((d.of_layer(i), layer) for i, layer in enumerate(d.layers))
    return next((p for form, layer in each if (p := _layer_fault(form, layer))), "")


def _sharing_fault(d: Description) -> str:
    """Layers that share keys and values are the last ones, and share those of one that makes some, of the
    same rope and window."""
    first = d.num_kv_layers
    for i, layer in enumerate(d.layers):
        if (layer.shares is None) != (i < first):
            return f"layer {i} makes keys and values behind one that shares some"
        if layer.shares is None:
            continue
        if not 0 <= layer.shares < first:
            return f"layer {i} shares keys and values of layer {layer.shares:,}, which makes none"
        other = d.layers[layer.shares]
        seen = [(x.rope, x.window, x.chunked, x.form[:2]) for x in (other, layer)]
        if seen[0] != seen[1]:
            return f"layer {i} shares keys and values of layer {layer.shares}, which turns or sees otherwise"
    usual = d.latent is None and not d.sinks and not d.qk_norm_whole
    usual = usual and not any(layer.unit_norm for layer in d.layers)
    return "" if usual or first == d.num_layers else "such attention shares no keys and values"


def _memory_fault(d: Description, m: Memory) -> str:
    if d.mixture is not None or d.post_norm or not d.pre_norm or d.mlp_bias:
        return (
            "feed-forwards of the embedding stand beside experts, biases or norms of the residual"
        )
    if not 0 <= m.dense <= MOST:
        return f"the dense feed-forward has {m.dense:,} numbers, 0 to {MOST:,} are due"
    if m.ranks and (not m.is_table or len(m.ranks) != d.num_layers):
        return f"a table of {d.num_layers:,} layers has ranks for {len(m.ranks):,}"
    if not all(0 < rank <= d.width for rank in m.ranks):
        return f"a table's ranks are not all from 1 to {d.width:,}"
    if not all(0 <= layer < d.num_layers for layer in m.off):
        return f"memories of layers are left out that are not among its {d.num_layers:,}"
    return ""


def _latent_fault(d: Description, x: Latent) -> str:
    sizes = (x.rank, x.rope, x.key, x.value)
    if min(sizes) <= 0 or max(*sizes, x.query_rank) > MOST or x.query_rank < 0 or x.rope % 2:
        return f"latent attention of sizes {sizes} and {x.query_rank} cannot be"
    if d.num_kv_heads != 1 or d.head_dim != x.rank + x.rope:
        return (
            f"{d.num_kv_heads} key heads of {d.head_dim:,} numbers of a latent; one of "
            f"{x.rank + x.rope:,} is due"
        )
    others = d.qkv_bias or d.qk_norm or d.qk_norm_whole or d.sinks
    ropes = all(r.rotated == x.rope for r in d.ropes)
    return "" if ropes and not others else "latent attention has another's rope, norms or biases"


def _delta_fault(d: Description, x: Delta | None) -> str:
    mixers = {layer.mixer for layer in d.layers}
    if "attention" not in mixers or not mixers <= set(MIXERS):
        said = str(sorted(mixers))[:80]
        return f"layers mix tokens by {said}; known are {', '.join(MIXERS)}, with attention in some"
    if not 0 <= d.kernel <= MOST_KERNEL or (d.kernel == 0) == ("conv" in mixers):
        return f"a short convolution of {d.kernel:,} tokens cannot be; 1 to {MOST_KERNEL} are known"
    if "conv" in mixers and (d.post_norm or not d.pre_norm or d.o_bias):
        return "short convolutions have norms before them, none after, and no biases"
    if (x is None) == ("delta" in mixers):
        return "layers of the gated delta rule, and its sizes: one is there without the other"
    if x is None:
        return ""
    sizes = (x.key_heads, x.value_heads, x.key, x.value, x.kernel)
    most = (WHOLE["num_heads"], WHOLE["num_heads"], MOST_HEAD, MOST_HEAD, MOST_KERNEL)
    if not all(0 < size <= limit for size, limit in zip(sizes, most, strict=True)):
        return f"the gated delta rule of sizes {sizes} cannot be; up to {most} are known"
    if x.value_heads % x.key_heads:
        return f"{x.value_heads} value heads over {x.key_heads} key heads: they must divide evenly"
    return (
        ""
        if d.pre_norm and not d.post_norm
        else "the gated delta rule has norms before it, and none after"
    )


def _shard_fault(d: Description, x: Shard) -> str:
    """Are these ranges of a model, and its own sizes theirs?"""
    if not 0 <= x.rank < x.world <= MOST_RANKS or not 0 < x.ffn_width <= MOST:
        return f"rank {x.rank:,} of {x.world:,}, of {x.ffn_width:,} neurons, cannot be"
    if (x.cut, x.attention) not in CUTS:
        return (
            f"it is cut by {x.cut[:80]!r} with attention {x.attention[:80]!r}, which is not known"
        )
    (first, last), all_layers = x.layers, (0, x.num_layers)
    is_whole = x.cut == "layers" or x.layers == all_layers
    if not 0 <= first < last <= x.num_layers or last - first != d.num_layers or not is_whole:
        return f"layers {first:,} to {last:,} of {x.num_layers:,} are not the {d.num_layers:,} here"
    if x.cut == "layers":
        is_due = (x.neurons, x.outputs) == ((0, d.ffn_width), (0, d.width))
        is_due = is_due and (x.heads, x.kv_heads) == ((0, d.num_heads), (0, d.num_kv_heads))
        return "" if is_due else "a rank of some layers has them whole"
    return _ranges_fault(d, x)


def _ranges_fault(d: Description, x: Shard) -> str:
    """Of layers that each rank has in part."""
    for (first, last), ends, most in (
        (x.neurons, x.neuron_ends, x.ffn_width),
        (x.outputs, x.output_ends, d.width if x.cut == "gather" else None),
    ):
        rising = all(a < b for a, b in pairwise((0, *ends)))
        own = len(ends) == x.world and (first, last) == (*(0, *ends)[x.rank : x.rank + 2],)
        if most is not None and not (rising and own and ends[-1] == most):
            return (
                f"rank {x.rank} has {first:,} to {last:,} of {most:,}, which are not shared out so"
            )
    if x.cut == "sum" and (x.outputs, x.output_ends) != ((0, d.width), ()):
        return "where parts are summed, each rank has all outputs"
    if x.heads[1] > x.num_heads or x.kv_heads[1] > x.num_kv_heads:
        return "a rank has heads that the model has not"
    fits = orders_fit(x.orders, d.num_layers, x.num_kv_heads)
    if not fits or (x.orders and x.attention != "heads"):
        return "orders of its key heads are none"
    sizes = [b - a for a, b in (x.neurons, x.heads, x.kv_heads)]
    is_due = sizes == [d.ffn_width, d.num_heads, d.num_kv_heads] and d.mixture is None
    return "" if is_due else "a rank's sizes are not those of its ranges"


def _mixture_fault(d: Description) -> str:
    m = d.mixture
    is_known = d.activation in ACTIVATIONS or re.fullmatch(THRESHOLD, d.activation)
    if not is_known or (d.activation == BIASED) != (m is not None and m.bias):
        biases = "with" if m is not None and m.bias else "without"
        return (
            f"the activation is {d.activation[:80]!r}, which is not one of experts {biases} biases"
        )
    if m is None:
        return ""
    if not (0 < m.used <= m.count <= MOST and 0 < m.width <= MOST and 0 <= m.shared <= MOST):
        return f"{m.used:,} of {m.count:,} experts of {m.width:,} numbers, and one of {m.shared:,}, cannot be"
    if not d.routed:
        return "no layer has experts, of which there are some"
    if m.nested:
        return _nested_fault(d, m)
    return beside_fault(d, m) or _router_fault(m)


def _nested_fault(d: Description, m: Mixture) -> str:
    """Pieces of a usual dense model's feed-forwards."""
    if m != Mixture(m.count, m.count, m.width, False, nested=True):
        return "nested experts are weighed, shared, grouped or biased; none of it is due"
    if m.count * m.width != d.ffn_width or not replace(d, mixture=None).is_usual or d.mlp_bias:
        return (
            f"{m.count:,} nested experts of {m.width:,} neurons are not a usual dense feed-forward of "
            f"{d.ffn_width:,}"
        )
    return ""


def _router_fault(m: Mixture) -> str:
    if m.score not in SCORES:
        return f"experts are weighed by {m.score[:80]!r}; known are {', '.join(SCORES)}"
    if not 0 < m.used_groups <= m.groups <= m.count or m.count % m.groups:
        return f"{m.used_groups:,} of {m.groups:,} groups of {m.count:,} experts cannot be"
    if m.groups > 1 and (m.count // m.groups < 2 or m.score != "sigmoid"):
        return f"{m.groups:,} groups of {m.count:,} experts weighed by {m.score} cannot be"
    if m.used > m.count // m.groups * m.used_groups:
        return (
            f"{m.used:,} experts of {m.used_groups:,} groups of {m.count // m.groups:,} cannot be"
        )
    return _outside("the scale of experts", m.scale, *SCALE)


def _layer_fault(d: Description, layer: Layer) -> str:
    rope = layer.rope
    if layer.window is not None and not 0 < layer.window <= MOST:
        return f"a window is {layer.window:,}, a whole number from 1 to {MOST:,} is due"
    if rope.rotated is not None and (rope.rotated % 2 or not 0 <= rope.rotated <= d.head_dim):
        return f"a rope turns {rope.rotated:,} of {d.head_dim:,} numbers, an even number is due"
    pairs = rope.pairs(d.head_dim)
    for divisors in (rope.divisors, rope.long_divisors):
        if len(divisors) not in (0, pairs):
            return f"a rope has {len(divisors):,} divisors, none or {pairs:,} are due"
    if (rope.long_divisors or rope.growth or rope.query_growth) and not 0 < rope.original <= MOST:
        return f"a rope's original context is {rope.original:,}, a number from 1 to {MOST:,} is due"
    if rope.query_shift not in (0, 1) or (layer.chunked and layer.window is None):
        return "a rope's shift is 0 or 1, and pieces of a context have a size"
    if layer.unit_norm and (d.qk_norm or d.latent is not None):
        return "heads are normed with weights and without: one of the two is due"
    if rope.growth and pairs < 2:
        return f"a growing rope turns {pairs} pairs, 2 or more are due"
    found = [
        _outside("a rope's base", rope.base, *BASE),
        _outside("a rope's scale", rope.scale, *SCALE),
    ]
    numbers = (*rope.divisors, *rope.long_divisors, rope.growth or 1.0, rope.query_growth or 1.0)
    found += [_outside("a rope's divisor", number, *DIVISOR) for number in numbers]
    return next(filter(None, found), "")


def _outside(name: str, value: float, low: float, high: float) -> str:
    """NaN is outside, too."""
    return (
        "" if low <= value <= high else f"{name} is {value}, a number from {low} to {high} is due"
    )
