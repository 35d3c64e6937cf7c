"""Where a prompt's time goes: `python -m experiments.engine.prefill_parts MODEL... [--tokens 512] [-o FILE]`.

In turn, so that a machine's drift falls on all alike: a large bf16 matmul (the peak), and the prompt, of
which torch's profiler says how long its matmuls and its attention take. The rest is decoding weights to
numbers, what is between the products, and Python.
"""

from __future__ import annotations

import time
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

import outsize
from experiments.runs import Row, arguments, record
from outsize.bench.speed import flops_per_token
from outsize.engine.model import Model
from outsize.forward.full import full
from outsize.forward.span import Span

LARGE = 4096


def matmul_s(x: torch.Tensor) -> float:
    started = time.perf_counter()
    x @ x.T
    return time.perf_counter() - started


def prompt_s(model: Model, ids: list[int]) -> float:
    kv, started = model.transformer.new_kv(), time.perf_counter()
    full(model.transformer, [Span(0, ids)], [kv])
    return time.perf_counter() - started


def parts(model: Model, ids: list[int]) -> dict[str, float]:
    """Shares of a prompt's time."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        whole = prompt_s(model, ids)
    spent = {e.key: e.self_cpu_time_total / 1e6 for e in seen.key_averages()}
    attention = sum(s for key, s in spent.items() if "attention" in key)
    return {"matmuls": spent["aten::mm"] / whole, "attention": attention / whole}


def measured(model: Model, tokens: int, turns: int) -> Row:
    t = model.transformer
    ids = [i * 7919 % (t.description.vocab_size - 300) + 200 for i in range(tokens)]
    d, g = t.description, torch.Generator().manual_seed(0)
    x = torch.randn(LARGE, LARGE, generator=g, dtype=torch.float32, device="cpu").to(torch.bfloat16)
    flop = tokens * flops_per_token(d)
    prompt_s(model, ids), matmul_s(x)
    pairs = [(matmul_s(x), prompt_s(model, ids)) for _ in range(turns)]
    shares = [parts(model, ids) for _ in range(turns)]
    peak = [2 * LARGE**3 / one for one, _ in pairs]
    return {
        "model": model.name, "tokens": tokens, "turns": turns, "flop": flop,
        "peak_flops": median(peak), "tokens_per_s": median(tokens / took for _, took in pairs),
        "share": median(flop / took / p for (_, took), p in zip(pairs, peak, strict=True)),
        "share_all": sorted(flop / took / p for (_, took), p in zip(pairs, peak, strict=True)),
        **{f"{name}_share": median(s[name] for s in shares) for name in shares[0]},
    }  # fmt: skip


def main() -> None:
    a = arguments(__doc__, "models+", tokens=512, turns=9)
    for name in a.models:
        with outsize.load(name, prefix_cache="off", quiet=True) as model:
            record(measured(model, a.tokens, a.turns), a.output)


if __name__ == "__main__":
    main()
