"""MemoryLLM in plain torch, from a checkpoint folder: what the golden vectors of that family are made by,
since transformers has no such class. Layer by layer (arXiv 2602.00398, section 3):

    x = x + attention(norm(x)) [+ feed_forward_C(norm(x + attention(norm(x))))] + feed_forward_M(norm(x_0))
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu


def rotated(x_HTE: Tensor, base: float) -> Tensor:
    """Heads in halves, as transformers rotates them."""
    size = x_HTE.shape[-1]
    rate = base ** (-torch.arange(0, size, 2).float() / size)
    angle = torch.arange(x_HTE.shape[1])[:, None].float() * rate
    cos, sin = angle.cos(), angle.sin()
    a, b = x_HTE.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def logits(folder: Path, tokens: list[int]) -> Tensor:
    """(T, V) fp32."""
    c = json.loads((folder / "config.json").read_text())
    w = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    size, eps = c["head_dim"], c["rms_norm_eps"]

    def norm(x: Tensor, name: str) -> Tensor:
        return rms_norm(x, (x.shape[-1],), w[name], eps)

    def gated(x: Tensor, name: str) -> Tensor:
        gate, up = (linear(x, w[f"{name}.{k}_proj.weight"]) for k in ("gate", "up"))
        return linear(silu(gate) * up, w[f"{name}.down_proj.weight"])

    first = x = w["model.embed_tokens.weight"][torch.tensor(tokens)]
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        y = norm(x, f"{p}input_layernorm.weight")
        q, k, v = (
            linear(y, w[f"{p}self_attn.{n}_proj.weight"]).view(len(x), -1, size).transpose(0, 1)
            for n in "qkv"
        )
        q, k = rotated(q, c["rope_theta"]), rotated(k, c["rope_theta"])
        k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (k, v))
        seen = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(seen.transpose(0, 1).flatten(1), w[f"{p}self_attn.o_proj.weight"])
        memory = gated(norm(first, f"{p}memory_layernorm.weight"), f"{p}mlp")
        if c.get("dense_intermediate_size"):
            x = x + gated(norm(x, f"{p}post_attention_layernorm.weight"), f"{p}dense_mlp")
        x = x + memory
    head = "model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"
    return linear(norm(x, "model.norm.weight"), w[head])
