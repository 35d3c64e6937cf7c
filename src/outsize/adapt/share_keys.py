"""Layers that share keys and values: a model's last ones make queries alone, and read what an earlier one
stored (as the second segment of Apple's model of 2025 does, arXiv 2507.13575)."""

from __future__ import annotations

from outsize.adapt import rewrite
from outsize.model_config import Description
from outsize.pack.tensors import Made
from outsize.storage.records import Records


def queries(records: Records, d: Description) -> dict[tuple[int, str], tuple[Made, ...]]:
    """Of each layer that shares keys and values in `d`: the rows that make queries, with their own codes."""
    rows, out = d.num_heads * d.head_dim, dict[tuple[int, str], tuple[Made, ...]]()
    for layer in range(d.num_kv_layers, d.num_layers):
        out[layer, "qkv"] = rewrite.first_rows(records.weights(layer, "qkv"), rows)
        if d.qkv_bias:
            bias = records.weights(layer, "qkv_bias")
            out[layer, "qkv_bias"] = rewrite.first_numbers(bias, rows)
    return out
