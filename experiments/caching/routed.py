"""Ours and llama.cpp on one mixture whose router asks for the same experts in both, as a recording says:
`python -m experiments.caching.routed MODEL.gguf TRACE --memory BYTES [--wrap 'COMMAND {bytes}']
[-o FILE.jsonl]`.

The model is made if it is not there: random weights of a Qwen3 mixture with the trace's layers, experts and
experts a token (`--shape`), of which some are written so that the routing is the trace's, token for token:
- the first channels of the residual stream are the router's alone: attention's output and the experts'
  write nothing there (zero rows), so that they stay what the embedding put there, in every layer;
- the embedding of id FIRST + t is one in channel t, and the router's column t favours the experts that the
  trace's token t chose in that layer (`gap` above the others).
So whoever computes this model and is fed ids FIRST, FIRST + 1, ... makes these choices: nothing is forced,
and rounding cannot change them. Each run is a fresh process, ours and llama.cpp in turn (weights in the
mapped file only, so that they can be dropped), with the same ids, the prompt in one span and then token by
token. Our worker also states how many of its choices were the trace's; last logits of both are compared.
One JSON object a pair.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from outsize.api import Model
    from outsize.bench.synthetic import Size
    from outsize.weights.trace import Trace

FIRST = 300  # the id of the trace's first token
MARK, GAP, STEP = (
    4.0,
    1.0,
    0.02,
)  # in the embedding; in the router, between chosen and other, and by rank
SHOWN = 64  # logits that are compared
PEER = Path(__file__).parents[1] / "peers" / "llamacpp.py"
Choices = list[list[tuple[int, ...]]]  # by layer, by token


def choices(trace: Trace) -> Choices:
    """What each layer asks for, token by token. Layers with fewer rows for the prompt (a recorder that
    skips the last layer's) repeat their last one."""
    prompt = prompt_of(trace)
    out: Choices = [[] for _ in range(trace.layers)]
    for e in trace.events:
        rows = [tuple(i - e.layer * trace.experts for i in row) for row in e.rows]
        out[e.layer] += rows + [rows[-1]] * (prompt - len(rows) if e.phase == 0 else 0)
    return out


def prompt_of(trace: Trace) -> int:
    return len(trace.events[0].rows)


def size_of(shape: str, trace: Trace) -> Size:
    """The named size, with the trace's layers, experts and experts a token."""
    from outsize.bench.synthetic import SIZES, Size

    small = Size(trace.layers, 512, 32, 4, 2, 1024, head_dim=64)
    base = small if shape == "small" else SIZES[shape]
    return replace(base, layers=trace.layers, experts=trace.experts, used=trace.used)


class Routed:
    """Changes random tensors, as they are written, into those of a model that routes as told."""

    def __init__(self, wanted: Choices, size: Size, seed: int) -> None:
        from outsize.bench.synthetic import BLOCK, recipe

        self._wanted, self._size, self._names = wanted, size, recipe("qwen3_moe", size).names
        self._random = np.random.default_rng(seed)
        self._tokens = len(wanted[0])
        self.channels = -(-self._tokens // BLOCK) * BLOCK
        if self.channels > size.width // 2 or FIRST + self._tokens > size.vocab:
            raise SystemExit(f"{self._tokens} tokens need a wider model or a larger vocabulary")

    def __call__(self, name: str, stored: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        if name == self._names["embed"]:
            return self._marked(stored)
        for layer, wanted in enumerate(self._wanted):
            mine = {k: self._names[k].replace("{i}", str(layer)) for k in NEEDED}
            if name == mine["o"]:
                stored.reshape(self._size.width, -1, 18)[: self.channels, :, :2] = 0
            if name == mine["expert_down"]:
                shape = self._size.experts, self._size.width, -1, 18
                stored.reshape(shape)[:, : self.channels, :, :2] = 0
            if name == mine["ffn_norm"]:
                stored[: self.channels] = 1
            if name == mine["router"]:
                return self._router(wanted)
        return stored

    def _marked(self, stored: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        """Q8_0: blocks of a half-precision step and 32 codes."""
        blocks = stored.reshape(self._size.vocab, -1, 34)
        blocks[:, : self.channels // 32] = 0
        for t in range(self._tokens):
            block = blocks[FIRST + t, t // 32]
            block[:2] = np.frombuffer(np.float16(MARK / 127).tobytes(), np.uint8)
            block[2 + t % 32] = 127
        return stored

    def _router(self, wanted: list[tuple[int, ...]]) -> np.ndarray:  # type: ignore[type-arg]
        """(experts, width): below -GAP, but for the chosen."""
        out = np.zeros((self._size.experts, self._size.width), np.float32)
        shape = self._size.experts, self._tokens
        out[:, : self._tokens] = -GAP - self._random.random(shape) / 4
        for t, ids in enumerate(wanted):
            for rank, i in enumerate(ids):
                out[i, t] = STEP * (len(ids) - rank)
        return out


NEEDED = ("o", "expert_down", "ffn_norm", "router")


def make(path: Path, shape: str, trace: Trace, seed: int = 1) -> None:
    """The GGUF."""
    from outsize.bench.synthetic import write

    size = size_of(shape, trace)
    write(path, "qwen3_moe", size, seed, Routed(choices(trace), size, seed))


class Watched:
    """A router, and what it chose."""

    def __init__(self, own: object) -> None:
        self._own, self.rows = own, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> object:
        return getattr(self._own, name)

    def __call__(self, *arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        ids, weights = self._own(*arguments)  # type: ignore[operator]
        self.rows.append(ids)
        return ids, weights


def watch(m: Model) -> list[Watched]:
    from outsize.model.ffn.experts import Mixture

    out = []
    for part in m.transformer.parts[1::2]:
        assert isinstance(part.held, Mixture)
        out.append(Watched(part.held.router))
        part.held.router = out[-1]  # type: ignore[assignment]
    return out


def agreed(watched: list[Watched], wanted: Choices) -> float:
    """The share of choices (a token in a layer) that are the trace's."""
    same = total = 0
    for w, rows in zip(watched, wanted, strict=True):
        found = [row for ids in w.rows for row in ids.tolist()]
        same += sum(set(a) == set(b) for a, b in zip(found, rows, strict=False))
        total += len(found)
    return same / total


def worker(a: argparse.Namespace) -> dict[str, object]:
    import outsize
    from experiments.memory.paging import Disk
    from outsize.forward.full import full
    from outsize.forward.span import Span
    from outsize.weights.budget import peak
    from outsize.weights.trace import read

    trace = read(Path(a.trace))
    prompt = prompt_of(trace)
    how = {"context": 256, "experts": a.experts, "draft": "none", "quiet": True}
    with outsize.load(str(a.model), memory=a.memory, **how) as m:  # type: ignore[arg-type]
        watched, disk, kv = watch(m), Disk(m), m.transformer.new_kv(256)
        rates = [disk.rate()]
        begun = time.perf_counter()
        (out,) = full(m.transformer, [Span(0, list(range(FIRST, FIRST + prompt)))], [kv])
        prompt_s, before = time.perf_counter() - begun, m.counts()
        begun = time.perf_counter()
        for t in range(prompt, prompt + a.new):
            (out,) = full(m.transformer, [Span(t, [FIRST + t])], [kv])
        step_s = (time.perf_counter() - begun) / a.new
        rates.append(disk.rate())
        t = m.counts().experts - before.experts
        missed = (t.bytes_demanded + t.bytes_useful) / a.new
        return {
            "engine": "outsize", "experts": a.experts, "decode_tokens_per_s": round(1 / step_s, 4),
            "prefill_tokens_per_s": round(prompt / prompt_s, 3), "hit_rate": round(t.hit_rate, 4),
            "missed_bytes_per_token": round(missed), "routed_as_recorded": agreed(watched, choices(trace)),
            "waited_s_per_token": round(t.waited_s / a.new, 5),
            "disk_bytes_per_s": [round(r) for r in rates],
            "of_ceiling": round(missed / (sum(rates) / len(rates)) / step_s, 4),
            "memory": m.placement.budget, "peak_bytes": peak(),
            "logits": [round(v, 4) for v in out.logits_KV[-1][:SHOWN].tolist()],
        }  # fmt: skip


def compared(ours: dict[str, object], theirs: dict[str, object]) -> dict[str, object]:
    """One pair: the ratios, and how like the last logits are (1: the same up to a factor)."""
    out: dict[str, object] = {}
    for key in ("decode_tokens_per_s", "prefill_tokens_per_s"):
        if key in ours and key in theirs:
            out[f"{key}_ratio"] = round(float(str(ours[key])) / float(str(theirs[key])), 3)
    mine, others = (d.pop("logits", None) for d in (ours, theirs))
    if mine and others:
        out["logits_correlation"] = round(float(np.corrcoef(mine, others)[0, 1]), 5)  # type: ignore[call-overload]
    return out | {"ours": ours, "theirs": theirs}


def main() -> None:
    from experiments.caching.experts import run
    from experiments.memory.paging import record
    from outsize import library
    from outsize.weights.trace import read

    p = argparse.ArgumentParser()
    p.add_argument("model", type=Path)
    p.add_argument("trace")
    p.add_argument("--memory", type=int, required=True)
    p.add_argument(
        "--shape", default="30b-a3b", help="a size of `outsize bench synthetic`, or small"
    )
    p.add_argument("--wrap", default="")
    p.add_argument("--experts", default="echo")
    p.add_argument("--new", type=int, default=48)
    p.add_argument("--pairs", type=int, default=3)
    p.add_argument("--python", default="", help="another interpreter for llama.cpp's side")
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("-o", "--output", type=Path)
    a = p.parse_args()
    if a.worker:
        print(json.dumps(worker(a)))
        return
    trace = read(Path(a.trace))
    a.new = min(a.new, len(choices(trace)[0]) - prompt_of(trace))
    if not a.model.exists():
        make(a.model, a.shape, trace)
    library.pack(str(a.model), quiet=True)
    common = ["-m", "experiments.caching.routed", str(a.model), a.trace, "--worker"]
    common += ["--memory", str(a.memory), "--experts", a.experts, "--new", str(a.new)]
    peer = [str(PEER), str(a.model), "--cold", "--no-repack", "--first-id", str(FIRST)]
    peer += ["--prompt-tokens", str(prompt_of(trace)), "--new-tokens", str(a.new)]
    facts: dict[str, object] = {"model": a.model.name, "trace": Path(a.trace).name, "cap": a.memory,
                                "experts": trace.experts, "used": trace.used,
                                "prompt_tokens": prompt_of(trace), "new_tokens": a.new}  # fmt: skip
    for pair in range(a.pairs):
        ours = run(a.wrap, a.memory, common)
        theirs = run(a.wrap, a.memory, peer, a.python)
        record(facts | {"pair": pair} | compared(ours, theirs), a.output)


if __name__ == "__main__":
    main()
