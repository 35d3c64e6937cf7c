"""The feed-forward sub-layer of models whose feed-forwards read the token: computed, or looked up."""

from __future__ import annotations

import torch

from outsize.kernels.norm import RMSNorm
from outsize.model.attention import vector
from outsize.model.ffn.dense import Dense
from outsize.model.ffn.lookup import Computed, LookedUp, MemorySubLayer
from outsize.model.half import SubLayer
from outsize.model.layers import Linear
from outsize.model_config import Description
from outsize.pack.kinds.layers import BESIDE, basis
from outsize.storage.table import Weights, activation_type


def memory_sublayer(d: Description, index: int, beside: Weights, w: Weights) -> MemorySubLayer:
    """A feed-forward of the token's embedding, or its table; `beside`: what of a table all layers share."""
    memory, dense = d.memory, None
    assert memory is not None
    if memory.dense:
        norm = RMSNorm(vector(w[f"{BESIDE}norm"]), d.norm_eps, activation_type(w[f"{BESIDE}down"]))
        maps = Linear(w[f"{BESIDE}gate_up"]), Linear(w[f"{BESIDE}down"])
        dense = SubLayer(norm, Dense(maps, d.activation))
    if index in memory.off:
        return MemorySubLayer(dense, None)
    if not memory.is_table:
        norm = RMSNorm(vector(w["ffn_norm"]), d.norm_eps, activation_type(w["gate_up"]))
        body = Dense((Linear(w["gate_up"]), Linear(w["down"])), d.activation)
        return MemorySubLayer(dense, Computed(norm, body))
    found = beside.get(basis(index))
    kind = torch.float32 if found is None else activation_type(found)
    linear = None if found is None else Linear(found)
    return MemorySubLayer(dense, LookedUp(index, linear, kind))
