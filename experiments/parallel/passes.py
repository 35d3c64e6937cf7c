"""What a prompt costs a rank, from whole passes."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from experiments.parallel.quiet import usual
from outsize.forward import chain_costs
from outsize.forward.chain_costs import DEPTH
from outsize.forward.full import hidden
from outsize.forward.span import Span
from outsize.model.transformer import Transformer
from outsize.parallel.programs import Prompt

CHUNKS, TRIES = 2, 3


@torch.inference_mode()
def passed(model: Transformer, chunk: int = 0) -> Prompt:
    """Seconds a token and a (query, key) pair, of all layers: where chain_costs runs one layer again and
    again, whose weights stay in caches, these run all of them in turn. `chunk`: tokens that are multiplied at
    once; 0: those of the model's own chunks."""
    before, model.chunk = model.chunk, chunk or model.chunk
    try:
        return _passed(model, chunk or CHUNKS * model.chunk)
    finally:
        model.chunk = before


def _passed(model: Transformer, rows: int) -> Prompt:
    took = list[float]()
    for start in (0, DEPTH):
        kv, tries = model.new_kv(start + rows), list[float]()
        _, num_heads, _, width = kv.like.shape
        for layer in range(model.description.num_kv_layers if start else 0):
            kv.append_entries(layer, kv.like.new_zeros(num_heads, start, width))
        for _ in range(TRIES):
            begun = time.perf_counter()
            hidden(model, [(Span(start, [0] * rows, 0), kv)])
            tries.append(time.perf_counter() - begun)
        took.append(usual(tries))
    pair_s = (took[1] - took[0]) / (rows * DEPTH)
    linear_s = (took[0] - pair_s * rows * rows / 2) / rows
    return replace(chain_costs.measured(model, 1), linear_s=linear_s, pair_s=pair_s)
