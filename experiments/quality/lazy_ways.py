"""Ways to run a prompt: whole, lazily, and ways to compute less of it that the product does not have, for
comparison. See lazy.py.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from outsize.forward.lazy import lazy
from outsize.forward.prune import Prune, parse_prefill
from outsize.forward.span import NARROW, Span
from outsize.kernels.attended import attended
from outsize.kernels.backend import AttentionSpec
from outsize.kernels.rows import Segment
from outsize.kv.kv import KV
from outsize.model.transformer import Transformer

REVIVE = "mode=revive"
WAYS = {
    "full": "full",
    "gentle": "lazy:gentle,score=last," + REVIVE,
    "fast": "lazy:fast,score=last," + REVIVE,
    "random tokens": "random:.41",
    "static prune": "lazy:score=last,keep=.3,after=.15,mode=drop",
    "early layers choose": "early:.15/.26",
    "gentle, window:16": "lazy:gentle,score=window:16",
    "fast, window:16": "lazy:fast,score=window:16",
    "fast, window:48": "lazy:fast,score=window:48",  # as many as TAIL
    "fast, layers:4": "lazy:fast,score=layers:4",
    "more at the end": "lazy:score=last,keep=.5/.4/.3,after=.15/.45/.75",
    "later": "lazy:score=last,keep=.5/.25/.125,after=.3/.6/.9",
    "mass .9": "lazy:gentle,score=last,mass=.9",
}  # of one that revives, the other modes are made
SINKS, TAIL = (
    4,
    48,
)  # tokens at the ends of a prompt that ways which choose before the model always keep
SEEN_ROWS, SEEN_LAYERS = 16, 4  # whose attention chooses in the way "early"


@dataclass
class Seen:
    """Rows of a step whose attention is kept, by layer (step.py's Watch)."""

    kv: KV
    positions: Sequence[int]
    rows: slice
    shares: list[Tensor] = field(default_factory=list)  # (S,) of each layer

    def is_for(self, layer: int) -> bool:
        return True

    def see(self, spec: AttentionSpec, qkv_RN: Tensor, cos_sin: Tensor) -> None:
        entries = self.kv.view(spec.layer), self.kv.positions[spec.layer]
        found = attended(spec, qkv_RN, cos_sin, self.positions, entries)
        self.shares.append(found / len(self.positions))


@dataclass(frozen=True)
class First:
    """A prompt that has been run: the logits after it, and what running on takes."""

    logits_V: Tensor
    kv: KV
    length: int
    share: float  # of (token, layer) pairs
    cpu_s: float
    prune: Prune | None = None


@torch.inference_mode()
def passed(
    t: Transformer, kv: KV, ids: Sequence[int], positions: Sequence[int], watch: tuple[int, int]
) -> tuple[Tensor, Seen]:
    """Some tokens of a prompt, at their positions, through the first layers: their states, and what the last
    ones attend to. `watch`: so many layers, so many rows."""
    layers, rows = watch
    h_TD, steps = t.embed([ids[p] for p in positions]), []
    for at in range(0, len(positions), t.chunk):
        some = positions[at : at + t.chunk]
        seen = Seen(kv, some[-rows:], slice(max(0, len(some) - rows), len(some)))
        is_last = at + t.chunk >= len(positions)
        step = t.step([Segment(kv, some)], len(some) > NARROW, [], [seen] if is_last else [])
        steps.append((h_TD[at : at + t.chunk], step))
    t.begin(True)
    for layer in t.paged_layers[: 2 * layers]:
        layer(steps)
    t.memory.end_pass()
    return h_TD, seen


def chosen(score_N: Tensor, share: float) -> list[int]:
    """Positions of the best, both ends of the prompt among them."""
    n = len(score_N)
    score_N = score_N.clone()
    score_N[:SINKS] = score_N[n - TAIL :] = torch.inf
    return sorted(score_N.topk(max(SINKS + TAIL, round(share * n))).indices.tolist())


def first(t: Transformer, ids: Sequence[int], way: str) -> First:
    """A prompt, run in one of the ways."""
    started, kv, n, layers = time.thread_time(), t.new_kv(), len(ids), len(t.paged_layers) // 2
    kind, _, told = way.partition(":")
    if kind in ("full", "lazy"):
        prune = parse_prefill(way)
        (out,) = lazy(t, [Span(0, ids, prune=prune)], [kv])
        took = time.thread_time() - started
        return First(out.logits_KV[-1], kv, n, kv.computed, took, prune)
    *early, share = map(float, told.split("/"))
    scored = 0
    if kind == "random":
        score_N = torch.rand(n, generator=torch.Generator().manual_seed(sum(ids)))
    else:
        scored = round(early[0] * layers)
        _, seen = passed(t, t.new_kv(), ids, range(n), (scored, SEEN_ROWS))
        score_N = torch.stack(seen.shares[-SEEN_LAYERS:]).sum(0)
    kept = chosen(score_N, share)
    h_TD, _ = passed(t, kv, ids, kept, (layers, 0))
    logits_V = t.logits(h_TD[-1:])[0]
    took = time.thread_time() - started
    return First(logits_V, kv, n, (scored / layers) + len(kept) / n, took)


def by_mode(begun: First) -> Iterator[tuple[str, First]]:
    """One prompt that was run to be revived; and as it is where it is pruned once, or dropped from all
    layers: the modes differ in what they keep of a prompt, not in what they compute."""
    yield "", replace(begun, kv=copy.deepcopy(begun.kv), prune=None)
    dropped = copy.deepcopy(begun.kv)
    gone = {
        p
        for pruned in dropped.pruned
        for p in pruned.tokens[pruned.depth < len(dropped.positions)].tolist()
    }
    for layer, kept in enumerate(dropped.positions):
        dropped.keep(layer, [i for i, p in enumerate(kept) if p not in gone])
    yield ", drop", replace(begun, kv=dropped, prune=None)
    yield ", revive", begun


def step(t: Transformer, begun: Sequence[First], tokens: Sequence[int], at: int) -> list[Tensor]:
    """(V,) logits of each sequence after a token more, as if it were alone. Changes the caches."""
    pairs = zip(begun, tokens, strict=True)
    spans = [Span(b.length + at, [token], prune=b.prune) for b, token in pairs]
    return [out.logits_KV[-1] for out in lazy(t, spans, [b.kv for b in begun])]


def replies(t: Transformer, begun: Sequence[First], size: int) -> list[list[int]]:
    """The likeliest tokens of each."""
    logits = [b.logits_V for b in begun]
    out = [[int(x.argmax())] for x in logits]
    for at in range(size - 1):
        logits = step(t, begun, [said[-1] for said in out], at)
        for said, x in zip(out, logits, strict=True):
            said.append(int(x.argmax()))
    return out


def likelihoods(t: Transformer, begun: Sequence[First], tokens: Sequence[int]) -> list[float]:
    """Of each, the log-probability of a continuation, in nats."""
    logits, out = [b.logits_V for b in begun], [0.0] * len(begun)
    for at, token in enumerate(tokens):
        out = [x + float(y.log_softmax(-1)[token]) for x, y in zip(out, logits, strict=True)]
        if at < len(tokens) - 1:
            logits = step(t, begun, [token] * len(begun), at)
    return out


def all_ways(t: Transformer, ids: Sequence[int], names: Sequence[str]) -> dict[str, First]:
    out = dict[str, First]()
    for name in names:
        begun = first(t, ids, WAYS[name])
        found = by_mode(begun) if REVIVE in WAYS[name] else [("", begun)]
        out |= {name + mode: one for mode, one in found}
    return out
