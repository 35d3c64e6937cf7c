"""Keys and values in 8 bits, cost and gain: `python -m experiments.quality.kv MODEL... --text FILE -o FILE`.

For each model the divergence (KL, in nats) of its predictions from its own with exact keys and values, on
2,048 tokens of a text, run as one prompt; and the longest context that a budget has room for, both ways.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

import outsize
from experiments.runs import Row, arguments, record
from outsize.engine.model import Model
from outsize.errors import BudgetError, ContextError
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.options import LoadOptions
from outsize.plan import decide
from outsize.plan.warmup import runtime_bytes

TOKENS, STEP = 2048, 256


def logits(model: Model, ids: list[int]) -> torch.Tensor:
    (out,) = full(model.transformer, [Span(0, ids, len(ids))], [model.transformer.new_kv()])
    return out.logits_KV.log_softmax(-1)


def quality(name: str, text: str) -> Row:
    with outsize.load(name, context=2 * TOKENS, prefix_cache="off", quiet=True) as model:
        ids = model.tokens.encode(text[: 20 * TOKENS])[:TOKENS]
        exact = logits(model, ids)
        model.transformer.kv = "int8"
        lossy = logits(model, ids)
        kl = (exact.exp() * (exact - lossy)).sum(-1)
        told = torch.tensor(ids[1:])
        losses = [-x[:-1].gather(1, told[:, None]).mean() for x in (exact, lossy)]
        bytes_ = [kv.like.shape[3] * kv.like.element_size() for kv in _both(model)]
    return {
        "model": model.name, "tokens": len(ids), "kl": float(kl.mean()), "kl_most": float(kl.max()),
        "top1": float((exact.argmax(-1) == lossy.argmax(-1)).float().mean()),
        "perplexity": math.exp(losses[0]), "perplexity_int8": math.exp(losses[1]),
        "bytes_ratio": bytes_[1] / bytes_[0],
    }  # fmt: skip


def _both(model: Model) -> list[Any]:
    out = []
    for kind in ("auto", "int8"):
        model.transformer.kv = kind
        out.append(model.transformer.new_kv())
    return out


def longest(name: str, memory: int, kv: str) -> int:
    """Tokens of context, in steps of STEP."""
    low, high = 0, 1 << 14
    while low < high:
        middle = (low + high + 1) // 2
        load = LoadOptions(context=middle * STEP, kv=kv, quiet=True)
        try:
            decide.foresee(name, load, memory, runtime_bytes(decide.compiled(load)))
            low = middle
        except (BudgetError, ContextError):
            high = middle - 1
    return low * STEP


def main() -> None:
    a = arguments(__doc__, "models+", text=Path, memory=1_000_000_000)
    for name in a.models:
        row = quality(name, a.text.read_text(encoding="utf-8"))
        for kv in ("auto", "int8"):
            row[f"longest_{kv}"] = longest(name, a.memory, kv)
        record(row | {"memory": a.memory}, a.output)


if __name__ == "__main__":
    main()
