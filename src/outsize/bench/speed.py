"""`outsize bench speed`: the ceiling first, then the measurement, then its share of the ceiling."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from outsize.engine import load as loading
from outsize.engine.model import Model
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.pack.format import Pack
from outsize.plan import probe
from outsize.system.memory import peak

TEXT = "The quick brown fox jumps over the lazy dog while the sea keeps its own slow time. "


@dataclass(frozen=True, slots=True)
class Card:
    """What the model asks of a machine, and what this machine can give."""

    bytes_per_token: int  # weights read for one token
    flops_per_token: int
    memory_bytes_per_s: float
    flops: float

    @property
    def decode_ceiling(self) -> float:
        return self.memory_bytes_per_s / self.bytes_per_token

    @property
    def prefill_ceiling(self) -> float:
        return self.flops / self.flops_per_token


def card(pack: Pack) -> Card:
    """Measures the machine; a second or two."""
    d = pack.description
    matrices = d.num_layers * d.width * (d.qkv_rows + d.num_heads * d.head_dim + 3 * d.ffn_width)
    tables = [t for t in pack.tables if t.name != "embed" or d.tied]
    return Card(
        bytes_per_token=sum(t.size for t in tables),
        flops_per_token=2 * matrices,
        memory_bytes_per_s=probe.memory_bandwidth(),
        flops=max(map(probe.matmul_speed, (torch.bfloat16, torch.float32))),
    )


def prompt(model: Model, length: int, start: int) -> list[int]:
    """`length` tokens of text, another stretch for another `start`."""
    ids = model.tokens.encode(TEXT, start=False)
    return [ids[(start + i) % len(ids)] for i in range(length)]


def measure(model: Model, prompt_tokens: int, new_tokens: int, batch: int) -> tuple[float, float]:
    """Tokens/s of one prefill and of decoding `batch` sequences greedily."""
    transformer = model.transformer
    kvs = [transformer.new_kv() for _ in range(batch)]
    spans = [Span(0, prompt(model, prompt_tokens, i)) for i in range(batch)]
    started = time.perf_counter()
    outs = full(transformer, spans, kvs)
    prefill_s = time.perf_counter() - started
    started = time.perf_counter()
    with transformer.threads.narrow(True):
        for i in range(new_tokens):
            picked = [int(out.logits_KV[-1].argmax()) for out in outs]
            outs = full(transformer, [Span(prompt_tokens + i, [t]) for t in picked], kvs)
    decode_s = time.perf_counter() - started
    return batch * prompt_tokens / prefill_s, batch * new_tokens / decode_s


def spread(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{statistics.median(values):,.1f} tokens/s ({low:,.1f} to {high:,.1f})"


def show(
    name: str,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    batch: int,
    threads: int | None,
    native: bool,
    quiet: bool,
) -> None:
    """Print card, measurement and one JSON object."""
    with loading.load(name, threads=threads, native=native, quiet=quiet) as model:
        c = card(model.pack)
        print(f"{model.name} on {probe.processor()}, {torch.get_num_threads()} threads")
        print(f"  a token reads {c.bytes_per_token / 1e6:,.1f} MB of weights;", end=" ")
        print(f"memory gives {c.memory_bytes_per_s / 1e9:.1f} GB/s:", end=" ")
        print(f"at most {c.decode_ceiling:,.1f} tokens/s decoded one by one")
        print(f"  a token takes {c.flops_per_token / 1e9:.2f} GFLOP;", end=" ")
        print(f"matrix products give {c.flops / 1e9:,.0f} GFLOP/s:", end=" ")
        print(f"at most {c.prefill_ceiling:,.0f} tokens/s of prompt", flush=True)
        measure(model, prompt_tokens, 4, batch)
        runs = [measure(model, prompt_tokens, new_tokens, batch) for _ in range(repeats)]
    prefill, decode = [r[0] for r in runs], [r[1] for r in runs]
    of_prefill = statistics.median(prefill) / c.prefill_ceiling
    of_decode = statistics.median(decode) / c.decode_ceiling
    print(f"  prefill of {prompt_tokens}: {spread(prefill)}, {of_prefill:.0%} of the ceiling")
    print(f"  decode of {new_tokens}: {spread(decode)}, {of_decode:.0%} of the ceiling", end="")
    print(f" (batch of {batch})" if batch > 1 else "")
    result = {
        "model": model.name,
        "threads": torch.get_num_threads(),
        "native": native,
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "prefill_tokens_per_s": round(statistics.median(prefill), 2),
        "decode_tokens_per_s": round(statistics.median(decode), 3),
        "prefill_all": [round(v, 2) for v in prefill],
        "decode_all": [round(v, 3) for v in decode],
        "prefill_share": round(of_prefill, 4),
        "decode_share": round(of_decode, 4),
        "bytes_per_token": c.bytes_per_token,
        "memory_bytes_per_s": round(c.memory_bytes_per_s),
        "matmul_flops": round(c.flops),
        "peak_memory_bytes": peak(),
    }
    print(json.dumps(result))
