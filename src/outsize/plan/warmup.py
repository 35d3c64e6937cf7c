"""Warm-up: run a tiny random model, so that libraries are loaded, and measure the memory that takes.

A library's pages come from disk when they are first touched: on a cold file cache some tenths of a second,
which the first prompt would pay, and some megabytes, which no plan would have counted.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from outsize.encoding.find import encoding
from outsize.kernels.backend import Backend
from outsize.kernels.plain import PLAIN
from outsize.kernels.rows import Rows, Segment
from outsize.kv.kv import KV
from outsize.model.half import Runnable
from outsize.model.step import Step
from outsize.model.sublayer import attention_sublayer, ffn_sublayer
from outsize.model.transformer import new_kv, rotary_angles
from outsize.model_config import Description, Layer, Rope
from outsize.storage.table import Weight, Weights
from outsize.system.memory import collect, promised, resident

TOKENS, WIDTH, HEAD = 64, 256, 64
# oneDNN compiles a product for each shape, and torch keeps a thousand of them: prompts of many lengths would
# take 300 MB that no plan knows. A pass alternates between fewer than this.
COMPILED, COMPILED_BYTES = 24, 300_000  # how many are kept, and what one takes
CACHES = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"


def runtime_bytes(backend: Backend = PLAIN) -> int:
    """Bytes of this process after a warm-up, with what models that are open in it have yet to take."""
    warm_up(backend)
    collect()
    return resident() + promised()


@torch.inference_mode()
def warm_up(backend: Backend) -> None:
    """Run one layer of each kind of linear map, as prompts and as single tokens run."""
    for name in CACHES:  # read at the first product; what a user has set stays
        os.environ.setdefault(name, str(COMPILED))
    layer = Layer(Rope(10000.0))
    d = Description("warm-up", WIDTH, 4, 2, HEAD, WIDTH, WIDTH, 2 * TOKENS, 1e-5, 0.125, (layer,))
    for name in ("int4", "int8", *(("group8",) if backend.name == "native" else ()), "fp32"):
        weights = _weights(d, name, backend)
        plain = name == "fp32"
        kv = new_kv(d, torch.float32 if plain else torch.bfloat16)
        h_TD = torch.ones(TOKENS, WIDTH, dtype=torch.float32, device="cpu")
        for sublayer in (attention_sublayer(d, 0, weights), ffn_sublayer(d, 0, weights)):
            _run(d, sublayer, kv, h_TD, PLAIN if plain else backend)


def _run(d: Description, sublayer: Runnable, kv: KV, h_TD: Tensor, backend: Backend) -> None:
    """A long span, then one token."""
    kv.truncate(0)
    for first, last in ((0, TOKENS), (TOKENS, TOKENS + 1)):
        positions, wide = range(first, last), last - first > 1
        angles = rotary_angles(d.rope_sizes, positions)
        step = Step(Rows([Segment(kv, positions)], wide), angles, PLAIN if wide else backend)
        sublayer.run([(h_TD[: last - first], step)])


def _weights(d: Description, name: str, backend: Backend) -> Weights:
    heads = d.num_heads * d.head_dim
    shapes = {
        "qkv": (d.qkv_rows, d.width), "o": (d.width, heads),
        "gate_up": (2 * d.ffn_width, d.width), "down": (d.width, d.ffn_width),
    }  # fmt: skip
    made: Weights = {k: (_weight(name, shape, backend),) for k, shape in shapes.items()}
    norm = (_weight("fp32", (1, d.width), PLAIN),)
    return made | {"attn_norm": norm, "ffn_norm": norm}


def _weight(name: str, shape: tuple[int, int], backend: Backend) -> Weight:
    w_NK = torch.ones(shape, dtype=torch.float32, device="cpu")
    e = encoding(name, backend)
    return Weight(e, e.encode(w_NK), len(w_NK))
