"""How long LoRA adapters take: `python -m experiments.lora.adapters MODEL [--rank 16]`.

Writes two random adapters of all projections in PEFT's form, loads them, and answers with one, the other and
the first again: milliseconds to load and to swap, and whether the logits came back to the bit.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from tests.drafts import write_peft

import outsize
from experiments.runs import arguments, record
from outsize.forward.full import full
from outsize.forward.span import Span


def main() -> None:
    a = arguments(__doc__, "model", rank=16)
    whole = outsize.load(a.model, draft="none", quiet=True)
    with whole as m, tempfile.TemporaryDirectory() as folder:
        t, loading = m.transformer, []
        for seed, name in enumerate("ab"):
            path = write_peft(m, Path(folder) / name, seed, a.rank)
            started = time.perf_counter()
            m.load_adapter(name, path)
            loading.append(1e3 * (time.perf_counter() - started))

        def step(name: str | None) -> tuple[torch.Tensor, float]:
            kv, adapter = t.new_kv(64), m.scheduler.adapter(name)
            full(t, [Span(0, range(100, 130), adapter=adapter)], [kv])
            started = time.perf_counter()
            (out,) = full(t, [Span(30, [7], adapter=m.scheduler.adapter(name))], [kv])
            return out.logits_KV, 1e3 * (time.perf_counter() - started)

        for name in (None, "a", "b"):
            step(name)
        plain, first, other, again = step(None), step("a"), step("b"), step("a")
        record({
            "model": m.name, "rank": a.rank, "load_ms": loading,
            "step_ms": {"plain": plain[1], "a": first[1], "b, after a": other[1], "a, after b": again[1]},
            "same_bits": bool(torch.equal(first[0], again[0])),
            "differ": not torch.equal(first[0], other[0]),
        }, a.output)  # fmt: skip


if __name__ == "__main__":
    main()
