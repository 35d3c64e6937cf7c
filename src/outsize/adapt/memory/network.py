"""Small transformers that are trained from nothing: MemoryLLM, Flex-MemoryLLM and, to compare with, the plain
llama of the same shape. Parameters are named as a checkpoint's tensors, so that what is trained is one.

Shapes: B sequences, S tokens, D width, H heads, E numbers a head, V vocabulary, F inner width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

EPS, BASE, SPREAD = 1e-5, 10_000.0, 0.02
MULTIPLE = 32  # of inner widths
EMBED, LAST_NORM = "model.embed_tokens.weight", "model.norm.weight"
Parameters = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a network. `inner`: numbers of the feed-forward, which reads the embedding or (`is_base`) the
    residual stream; `dense`: of a second one, of the residual stream; 0: there is none."""

    layers: int
    width: int
    heads: int
    vocab: int
    inner: int
    dense: int = 0
    is_base: bool = False
    shared_norm: bool = False  # of the embedding, one for all layers

    @property
    def non_embedding(self) -> int:
        """Parameters beside the embedding."""
        each = 4 * self.width + 3 * (self.inner + self.dense)
        return self.layers * self.width * each

    @property
    def active(self) -> int:
        """The same, without what a table stands for."""
        inner = self.inner if self.is_base else 0
        return self.layers * self.width * (4 * self.width + 3 * (inner + self.dense))

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of each parameter."""
        d, out = self.width, {EMBED: (self.vocab, self.width), LAST_NORM: (self.width,)}
        found: dict[str, tuple[int, ...]] = dict(out)
        for i in range(self.layers):
            p = f"model.layers.{i}."
            found |= {f"{p}self_attn.{n}_proj.weight": (d, d) for n in "qkvo"}
            found |= {f"{p}input_layernorm.weight": (d,)} | _gated(f"{p}mlp", self.inner, d)
            if self.is_base or self.dense:
                found[f"{p}post_attention_layernorm.weight"] = (d,)
            if not self.is_base and not (self.shared_norm and i):
                found[memory_norm(i)] = (d,)
            if self.dense:
                found |= _gated(f"{p}dense_mlp", self.dense, d)
        return found


def memory_norm(layer: int) -> str:
    """The name of the norm of the embedding before a layer's feed-forward."""
    return f"model.layers.{layer}.memory_layernorm.weight"


def _gated(name: str, inner: int, width: int) -> dict[str, tuple[int, ...]]:
    if not inner:
        return {}
    up, down = (inner, width), (width, inner)
    shapes = {"gate": up, "up": up, "down": down}
    return {f"{name}.{n}_proj.weight": shape for n, shape in shapes.items()}


def flex(layers: int, width: int, heads: int, vocab: int, beta: int) -> Shape:
    """MemoryLLM's shape; of `beta` > 0 Flex's, where so many width^2 numbers of each feed-forward read the
    residual stream. Both have the numbers of a llama whose feed-forwards are 8/3 of its width."""
    inner, dense = 8 * width // 3, beta * width // 3 // MULTIPLE * MULTIPLE
    return Shape(layers, width, heads, vocab, inner // MULTIPLE * MULTIPLE - dense, dense)


def new_parameters(shape: Shape, seed: int) -> dict[str, Tensor]:
    """What training begins with: small normal numbers, norms of 1; maps back to the residual stream smaller
    with the depth."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, size in shape.tensors().items():
        made = torch.ones(size, dtype=torch.float32, device="cpu")
        if len(size) == 2:
            is_last = name.endswith(("o_proj.weight", "down_proj.weight"))
            spread = SPREAD / math.sqrt(2 * shape.layers) if is_last else SPREAD
            made.normal_(0.0, spread, generator=generator)
        out[name] = made
    return out


def forward(p: Parameters, shape: Shape, ids_BS: Tensor, off: tuple[int, ...] = ()) -> Tensor:
    """(B, S, D): the last norm's output. `off`: layers whose feed-forward of the embedding is left out."""
    first_BSD = x_BSD = embedding(ids_BS, p[EMBED])
    cos_sin = _angles(ids_BS.shape[1], shape.width // shape.heads, ids_BS.device)
    for i in range(shape.layers):
        name = f"model.layers.{i}."
        x_BSD = x_BSD + _attention(p, name, shape, x_BSD, cos_sin)
        if shape.is_base:
            x_BSD = x_BSD + _feed_forward(p, name, "post_attention_layernorm", "mlp", x_BSD)
            continue
        if shape.dense:
            x_BSD = x_BSD + _feed_forward(p, name, "post_attention_layernorm", "dense_mlp", x_BSD)
        if i not in off:
            norm = p[memory_norm(0 if shape.shared_norm else i)]
            x_BSD = x_BSD + _mlp(p, f"{name}mlp", _norm(first_BSD, norm))
    return _norm(x_BSD, p[LAST_NORM])


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x.float(), weight.shape, weight, EPS)


def _feed_forward(p: Parameters, layer: str, norm: str, name: str, x: Tensor) -> Tensor:
    if f"{layer}{name}.up_proj.weight" not in p:
        return torch.zeros_like(x)
    return _mlp(p, f"{layer}{name}", _norm(x, p[f"{layer}{norm}.weight"]))


def _mlp(p: Parameters, name: str, x: Tensor) -> Tensor:
    gate, up = (linear(x, p[f"{name}.{n}_proj.weight"]) for n in ("gate", "up"))
    return linear(silu(gate) * up, p[f"{name}.down_proj.weight"])


def _attention(
    p: Parameters, name: str, shape: Shape, x_BSD: Tensor, cos_sin: tuple[Tensor, Tensor]
) -> Tensor:
    y = _norm(x_BSD, p[f"{name}input_layernorm.weight"])
    q, k, v = (
        linear(y, p[f"{name}self_attn.{n}_proj.weight"])
        .unflatten(-1, (shape.heads, -1))
        .transpose(1, 2)
        for n in "qkv"
    )
    q, k = (_rotated(t, *cos_sin).to(v.dtype) for t in (q, k))
    seen = scaled_dot_product_attention(q, k, v, is_causal=True)
    return linear(seen.transpose(1, 2).flatten(2), p[f"{name}self_attn.o_proj.weight"])


def _angles(count: int, head: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rate = BASE ** (-torch.arange(0, head, 2, dtype=torch.float32, device=device) / head)
    angle = torch.arange(count, dtype=torch.float32, device=device)[:, None] * rate
    return angle.cos(), angle.sin()


def _rotated(x_BHSE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads in halves, as Hugging Face's checkpoints have them."""
    a, b = x_BHSE.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
