"""A mixture whose own router makes a recording's choices, in any engine: what experts.py measures.

Random weights of a Qwen3 mixture with the trace's layers, experts and experts a token, of which some are
written so that the routing is the trace's, token for token:
- the first channels of the residual stream are the router's alone: attention's output and the experts'
  write nothing there (zero rows), so that they stay what the embedding put there, in every layer;
- the embedding of id FIRST + t is one in channel t, and the router's column t favours the experts that the
  trace's token t chose in that layer (GAP above the others).
So whoever computes this model and is fed ids FIRST, FIRST + 1, ... makes these choices: nothing is forced,
and rounding cannot change them.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

import outsize
from outsize.bench.synthetic.gguf import TYPES, write
from outsize.bench.synthetic.shapes import MIXES, SIZES, Size, recipe
from outsize.caching.prefetcher import Scored
from outsize.caching.replay.trace import Trace
from outsize.model.ffn.experts import Mixture, Router

FIRST = 300  # the id of the trace's first token
MARK, GAP, STEP = 4.0, 1.0, 0.02  # of the embedding; of the router, to those not chosen and by rank
NEEDED = ("o", "expert_down", "ffn_norm", "router")
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


class Routed:
    """Changes random tensors, as they are written, into those of a model that routes as told."""

    def __init__(self, wanted: Choices, size: Size, seed: int, types: str = "q4_0") -> None:
        self._type = TYPES[MIXES[types][0]]
        self._wanted, self._size, self._names = wanted, size, recipe("qwen3_moe", size).names
        self._random = np.random.default_rng(seed)
        self._tokens = len(wanted[0])
        block = TYPES["Q8_0"].weights
        self.channels = -(-self._tokens // block) * block
        if self.channels > size.width // 2 or FIRST + self._tokens > size.vocab:
            raise SystemExit(f"{self._tokens} tokens need a wider model or a larger vocabulary")

    def __call__(self, name: str, stored: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        if name == self._names["embed"]:
            return self._marked(stored)
        for layer, wanted in enumerate(self._wanted):
            mine = {k: self._names[k].replace("{i}", str(layer)) for k in NEEDED}
            if name == mine["o"]:
                self._silenced(stored.reshape(1, self._size.width, -1))
            if name == mine["expert_down"]:
                self._silenced(stored.reshape(self._size.experts, self._size.width, -1))
            if name == mine["ffn_norm"]:
                stored[: self.channels] = 1
            if name == mine["router"]:
                return self._router(wanted)
        return stored

    def _silenced(self, stored: np.ndarray) -> None:  # type: ignore[type-arg]
        """Nothing is written to the first channels: their blocks' scales are 0."""
        blocks = stored.reshape(*stored.shape[:2], -1, self._type.nbytes)
        for at in (self._type.scale, self._type.low):
            if at is not None:
                blocks[:, : self.channels, :, at : at + 2] = 0

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


def make(path: Path, shape: str, trace: Trace, seed: int = 1, types: str = "q4_0") -> None:
    """The GGUF, of the named size with the trace's layers, experts and experts a token. `types`: a mix of
    `bench synthetic` whose embedding is Q8_0."""
    small = Size(trace.layers, 512, 32, 4, 2, 1024, head_dim=64)
    base = small if shape == "small" else SIZES[shape]
    size = replace(base, layers=trace.layers, experts=trace.experts, used=trace.used)
    write(path, "qwen3_moe", size, seed, Routed(choices(trace), size, seed, types), types)


class Watched:
    """A router, and what it chose. The early gate tells each of the next choices with the chance `recall`,
    as a trained model's would, and else any expert."""

    def __init__(
        self, own: Router, wanted: list[tuple[int, ...]], count: int, recall: float
    ) -> None:
        self._own, self._wanted, self._count, self._recall = own, wanted, count, recall
        self._random, self.rows, self.norm = random.Random(1), list[Tensor](), own.norm

    def __call__(
        self, x_TD: Tensor, wide: bool, routing_bias_N: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        ids, weights = self._own(x_TD, wide, routing_bias_N)
        self.rows.append(ids)
        return ids, weights

    def reads(self, h_TD: Tensor, x_TD: Tensor) -> Tensor:
        return self._own.reads(h_TD, x_TD)

    def early(self, h_TD: Tensor, most: int) -> Scored:
        own = self._own.early(h_TD, most)
        at = sum(map(len, self.rows))
        if self._recall == 1 or not 0 < at < len(self._wanted):  # a prompt wants nearly all experts
            return own
        told = [
            i if self._random.random() < self._recall else self._random.randrange(self._count)
            for i in self._wanted[at]
        ]
        return tuple((i, 1 / len(told)) for i in dict.fromkeys(told))


def watch(m: outsize.Model, wanted: Choices, recall: float = 1.0) -> list[Watched]:
    """The routers of a model, watched from now on."""
    out, count = [], m.pack.description.mixture.count
    for part, rows in zip(m.transformer.paged_layers[1::2], wanted, strict=True):
        assert isinstance(part.resident, Mixture)
        out.append(Watched(part.resident.router, rows, count, recall))
        part.resident.router = out[-1]  # type: ignore[assignment]
    return out


def agreed(watched: list[Watched], wanted: Choices) -> float:
    """The share of choices (a token in a layer) that are the trace's."""
    same = total = 0
    for w, rows in zip(watched, wanted, strict=True):
        found = [row for ids in w.rows for row in ids.tolist()]
        same += sum(set(a) == set(b) for a, b in zip(found, rows, strict=False))
        total += len(found)
    return same / total
