"""What numbers a description may have: bounds within which nothing overflows, divides by nothing or asks
for more than a machine can address. Checkpoints and packs are held to the same."""

from __future__ import annotations

from outsize.family.config import LIMITS, MOST_HEAD
from outsize.model_config import ACTIVATIONS, BIASED, Description, Layer

MOST = 1 << 24
WHOLE = {
    "width": MOST, "ffn_width": MOST, "vocab_size": MOST, "context": MOST, "head_dim": MOST_HEAD,
    "num_heads": LIMITS["num_attention_heads"], "num_kv_heads": LIMITS["num_key_value_heads"],
    "num_layers": LIMITS["num_hidden_layers"],
}  # fmt: skip
REAL = {"norm_eps": (1e-20, 1.0), "attn_scale": (1e-12, 1e4), "embed_scale": (1e-12, 1e5)}
BASE, DIVISOR, SCALE = (1.0, 1e12), (1e-12, 1e12), (1e-6, 1e3)


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
    return _mixture_fault(d) or next((p for layer in d.layers if (p := _layer_fault(d, layer))), "")


def _mixture_fault(d: Description) -> str:
    m = d.mixture
    if d.activation not in ACTIVATIONS or (d.activation == BIASED) != (m is not None and m.bias):
        biases = "with" if m is not None and m.bias else "without"
        return (
            f"the activation is {d.activation[:80]!r}, which is not one of experts {biases} biases"
        )
    if m is None:
        return ""
    if 0 < m.used <= m.count <= MOST and m.width == d.ffn_width:
        return ""
    return (
        f"{m.used:,} of {m.count:,} experts of {m.width:,} numbers beside an ffn_width of {d.ffn_width:,} "
        "cannot be"
    )


def _layer_fault(d: Description, layer: Layer) -> str:
    rope = layer.rope
    if layer.window is not None and not 0 < layer.window <= MOST:
        return f"a window is {layer.window:,}, a whole number from 1 to {MOST:,} is due"
    if len(rope.divisors) not in (0, d.head_dim // 2):
        return f"a rope has {len(rope.divisors):,} divisors, none or {d.head_dim // 2:,} are due"
    found = [
        _outside("a rope's base", rope.base, *BASE),
        _outside("a rope's scale", rope.scale, *SCALE),
    ]
    found += [_outside("a rope's divisor", divisor, *DIVISOR) for divisor in rope.divisors]
    return next(filter(None, found), "")


def _outside(name: str, value: float, low: float, high: float) -> str:
    """NaN is outside, too."""
    return (
        "" if low <= value <= high else f"{name} is {value}, a number from {low} to {high} is due"
    )
