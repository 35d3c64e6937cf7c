"""`outsize bench speed`: the ceiling first, then the measurement, then its share of the ceiling."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from outsize.arguments import whole
from outsize.engine import load as loading
from outsize.engine.model import Model
from outsize.forward.prune import parse_prefill
from outsize.forward.runahead import Chain
from outsize.forward.span import Span
from outsize.model_config import Description
from outsize.options import LoadChanges
from outsize.pack.format import Pack
from outsize.plan import probe
from outsize.system.memory import peak

TEXT = "The quick brown fox jumps over the lazy dog while the sea keeps its own slow time. "


@dataclass(frozen=True, slots=True)
class SpeedOptions:
    """What to measure."""

    prompt_tokens: int = 512
    new_tokens: int = 64
    repeats: int = 5
    batch: int = 1  # sequences decoded at once
    prefill: str = "full"
    threads: int | None = None
    native: bool = True
    quiet: bool = False
    memory: str = "auto"
    ranks: int = 1
    listen: str | None = None
    parallel: str = "tensor"

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "repeats", "batch"):
            whole(name, getattr(self, name), 1, 1 << 20)
        parse_prefill(self.prefill)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The roofline: what a token asks of this machine, and what the machine can give."""

    bytes_per_token: int  # weights read for one token
    flops_per_token: int
    memory_bytes_per_s: float
    matmul_flops: float

    @property
    def decode(self) -> float:
        """Tokens/s, one by one."""
        return self.memory_bytes_per_s / self.bytes_per_token

    @property
    def prefill(self) -> float:
        """Tokens/s of a prompt."""
        return self.matmul_flops / self.flops_per_token


def flops_per_token(d: Description) -> int:
    """Of the layers' matrices."""
    forms = (d.of_layer(i) for i in range(d.num_layers))
    rows = (f.qkv_rows + f.num_heads * f.head_dim + (3 - f.two_matrix) * f.ffn_width for f in forms)
    return 2 * d.width * sum(rows)


def ceilings(pack: Pack) -> Ceilings:
    """Measures the machine; a second or two."""
    d = pack.description
    tables = [t for t in pack.tables if t.name != "embed" or d.tied]
    return Ceilings(
        bytes_per_token=sum(t.size for t in tables),
        flops_per_token=flops_per_token(d),
        memory_bytes_per_s=probe.memory_bandwidth(),
        matmul_flops=max(map(probe.matmul_speed, (torch.bfloat16, torch.float32))),
    )


def prompt(model: Model, length: int, start: int) -> list[int]:
    """`length` tokens of text, another stretch for another `start`."""
    ids = model.tokens.encode(TEXT, start=False)
    return [ids[(start + i) % len(ids)] for i in range(length)]


def measure(
    model: Model,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    between: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Tokens/s of one prefill and of decoding `batch` sequences greedily; `between` them that is called."""
    transformer, prune = model.transformer, parse_prefill(model.prefill)
    forward = model.scheduler.forward
    kvs = [transformer.new_kv() for _ in range(batch)]
    spans = [Span(0, prompt(model, prompt_tokens, i), prune=prune) for i in range(batch)]
    started = time.perf_counter()
    outs = forward(transformer, spans, kvs)
    prefill_s = time.perf_counter() - started
    between()
    started = time.perf_counter()
    with transformer.threads.narrow(True):
        for i in range(new_tokens):
            picked = [int(out.logits_KV[-1].argmax()) for out in outs]
            fed = [Span(prompt_tokens + i, [t], prune=prune) for t in picked]
            outs = forward(transformer, fed, kvs)
    decode_s = time.perf_counter() - started
    return batch * prompt_tokens / prefill_s, batch * new_tokens / decode_s


def sent(model: Model) -> tuple[int, int]:
    """Messages and bytes that this rank has sent to others so far."""
    forward = model.scheduler.forward
    leader = forward if isinstance(forward, Chain) else model.transformer.leader
    return (0, 0) if leader is None else (leader.wire.messages, leader.wire.sent)


def spread(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{statistics.median(values):,.1f} tokens/s ({low:,.1f} to {high:,.1f})"


def show(name: str, options: SpeedOptions) -> None:
    """Print the ceilings, the measurement and, last, one JSON object."""
    o = options
    how: LoadChanges = {"threads": o.threads, "native": o.native, "quiet": o.quiet}
    how |= {"prefill": o.prefill, "prefix_cache": "off", "memory": o.memory}
    how |= {"ranks": o.ranks, "listen": o.listen, "parallel": o.parallel}
    with loading.load(name, **how) as model:
        c = ceilings(model.pack)
        print(f"{model.name} on {probe.processor()}, {torch.get_num_threads()} threads")
        print(
            f"  a token reads {c.bytes_per_token / 1e6:,.1f} MB of weights; memory gives "
            f"{c.memory_bytes_per_s / 1e9:.1f} GB/s: at most {c.decode:,.1f} tokens/s decoded one by one"
        )
        print(
            f"  a token takes {c.flops_per_token / 1e9:.2f} GFLOP; matrix products give "
            f"{c.matmul_flops / 1e9:,.0f} GFLOP/s: at most {c.prefill:,.0f} tokens/s of prompt",
            flush=True,
        )
        measure(model, o.prompt_tokens, 4, o.batch)
        before = sent(model)
        runs = [measure(model, o.prompt_tokens, o.new_tokens, o.batch) for _ in range(o.repeats)]
        messages, size = (b - a for a, b in zip(before, sent(model), strict=True))
    prefill, decode = zip(*runs, strict=True)
    of_prefill = statistics.median(prefill) / c.prefill
    of_decode = statistics.median(decode) / c.decode
    batch = f" (batch of {o.batch})" if o.batch > 1 else ""
    print(f"  prefill of {o.prompt_tokens}: {spread(prefill)}, {of_prefill:.0%} of the ceiling")
    print(f"  decode of {o.new_tokens}: {spread(decode)}, {of_decode:.0%} of the ceiling{batch}")
    tokens = o.repeats * (o.prompt_tokens + o.new_tokens) * o.batch
    if o.ranks > 1:
        print(
            f"  {o.ranks} ranks, {o.parallel}: {messages / o.repeats / (1 + o.new_tokens):,.0f} messages a "
            f"step and {size / tokens:,.0f} bytes a token sent by the leader"
        )
    print(json.dumps({
        "model": model.name, "threads": torch.get_num_threads(), "native": o.native, "batch": o.batch,
        "prefill": o.prefill, "ranks": o.ranks, "parallel": o.parallel,
        "messages_sent": messages, "bytes_sent": size,
        "prompt_tokens": o.prompt_tokens, "new_tokens": o.new_tokens,
        "prefill_tokens_per_s": round(statistics.median(prefill), 2),
        "decode_tokens_per_s": round(statistics.median(decode), 3),
        "prefill_all": [round(v, 2) for v in prefill], "decode_all": [round(v, 3) for v in decode],
        "prefill_share": round(of_prefill, 4), "decode_share": round(of_decode, 4),
        "bytes_per_token": c.bytes_per_token, "memory_bytes_per_s": round(c.memory_bytes_per_s),
        "matmul_flops": round(c.matmul_flops), "peak_memory_bytes": peak(),
    }))  # fmt: skip
