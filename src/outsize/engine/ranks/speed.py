"""How fast a rank is, for sharing a model out: bytes of its matrices that it multiplies a second."""

from __future__ import annotations

import torch

from outsize.encoding.find import encoding
from outsize.kernels.backend import Backend
from outsize.pack.format import Pack
from outsize.plan.probe import median_s
from outsize.storage.table import activation_type

ROWS = 1024  # of the matrix that is measured


@torch.inference_mode()
def bytes_per_s(pack: Pack, backend: Backend) -> float:
    """Of one row times a matrix as the model's feed-forwards have."""
    named = ("ffn", "dense", "experts")
    table = next(t for t in pack.tables if t.name.split("-")[0] in named and "gate_up" in t.tensors)
    m = table.tensors["gate_up"][0]
    rows = min(ROWS, m.num_rows)
    e = encoding(m.encoding, backend)
    fields = e.encode(torch.randn(rows, m.width, dtype=torch.float32, device="cpu"))
    dtype = activation_type((m,))
    x, multiply = torch.randn(1, m.width, dtype=dtype, device="cpu"), e.product(fields)
    return sum(f.nbytes for f in fields.values()) / median_s(lambda: multiply(x, False), 15)
