"""A slow, plain reference of lazy prefill: each layer keeps hidden states, keys and values of its own for
each token, and attention is a loop over rows and heads. It shares linear maps with the engine, no more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from outsize.forward.part import REVIVED
from outsize.forward.prune import Prune
from outsize.kernels.backend import AttentionSpec
from outsize.kernels.plain import Plain
from outsize.model.step import Step
from outsize.model.transformer import Transformer, rotary_angles


class Reference(Plain):
    """One sequence. `step` runs some more tokens of it."""

    def __init__(self, model: Transformer, prune: Prune) -> None:
        self.model, self.prune, self.d = model, prune, model.description
        self.num_layers = self.d.num_layers
        self.tokens: list[int] = []
        # By layer: what goes into it, and keys and values, of each token; layer number L: what comes out.
        self.states: list[dict[int, Tensor]] = [{} for _ in range(self.num_layers + 1)]
        self.keys: list[dict[int, Tensor]] = [{} for _ in range(self.num_layers)]
        self.values: list[dict[int, Tensor]] = [{} for _ in range(self.num_layers)]
        self.shares: dict[int, list[float]] = {}
        self.watched: list[int] = []
        self.computed, self.is_prompt = 0, True

    def step(self, new: Sequence[int], prompt: bool) -> Tensor:
        """(V,): logits after the last token."""
        start, self.is_prompt = len(self.tokens), prompt
        self.tokens += new
        fresh = list(range(start, len(self.tokens)))
        learned = self.model.positions_PD
        for p, row in zip(fresh, self.model.embed(list(new)), strict=True):
            self.states[0][p] = row.clone() if learned is None else row + learned[p]
        revives = self.prune.mode == "revive"
        chosen = list(range(len(self.tokens))) if revives else fresh
        size = len(chosen)
        self.watched, self.shares = fresh[-self.prune.window :], {}
        for layer in range(self.num_layers):
            if layer in self.points and (prompt or revives):
                kept_always = fresh[-self.prune.window :] if prompt else fresh
                chosen = self.best(chosen, layer, size, kept_always, start)
            rows = [p for p in chosen if p not in self.keys[layer]]
            rows += [] if prompt or revives else [p for p in fresh if p not in rows]
            self.run(layer, sorted(rows))
        if prompt and self.prune.mode == "drop":
            for layer in range(self.num_layers):
                for p in set(fresh) - set(chosen):
                    self.keys[layer].pop(p, None)
                    self.values[layer].pop(p, None)
        return self.model.logits(self.states[-1][len(self.tokens) - 1][None])[0]

    @property
    def points(self) -> dict[int, float]:
        return self.prune.points(self.num_layers)

    def best(
        self, chosen: list[int], layer: int, size: int, always: list[int], fresh: int
    ) -> list[int]:
        seeing = [i for i in range(layer) if self.d.layers[i].window is None]
        layers = (seeing or list(range(layer)))[-self.prune.layers :]
        score = {p: sum(self.shares[i][p] for i in layers) for p in chosen}
        order = sorted(chosen, key=lambda p: (p in always, score[p], p), reverse=True)
        count = math.ceil(self.points[layer] * size - 1e-9)
        if self.prune.mass is not None:
            count, held = len(always), 0.0
            total = sum(score[p] for p in chosen if p not in always)
            for p in [p for p in order if p not in always]:
                if held >= self.points[layer] * total:
                    break
                held += score[p]
                count += 1
        order = order[: max(count, len(always))]
        late = [p for p in order if p not in self.keys[layer] and p < fresh]
        most = self.model.chunk if self.is_prompt else REVIVED
        order = [p for p in order if p not in late[most:]]
        return sorted(order)

    def run(self, layer: int, rows: list[int]) -> None:
        h = torch.stack([self.states[layer][p] for p in rows])
        angles = rotary_angles(self.d.rope_sizes, rows)
        told = SimpleNamespace(wide=False, positions=rows, all_positions=lambda: rows)
        step = Step(told, angles, self)  # type: ignore[arg-type]
        for part in self.model.paged_layers[2 * layer : 2 * layer + 2]:
            part([(h, step)])
        for p, row in zip(rows, h, strict=True):
            self.states[layer + 1][p] = row
        self.computed += len(rows)

    def attend(self, spec: AttentionSpec, qkv: Tensor, cos_sin: Tensor, rows: object) -> Tensor:
        positions: list[int] = rows.positions  # type: ignore[attr-defined]
        x = qkv if spec.bias is None else qkv + spec.bias
        heads, kv_heads = spec.num_heads, spec.num_kv_heads
        x = x.reshape(len(x), heads + 2 * kv_heads, spec.head_dim).clone()
        if spec.norm is not None:
            qk = x[:, : heads + kv_heads]
            root = (qk.pow(2).mean(-1, keepdim=True) + spec.norm.eps).sqrt()
            x[:, : heads + kv_heads] = qk / root * spec.norm.weight
        pairs = x[:, : heads + kv_heads].unflatten(-1, (-1, 2))
        c, s = cos_sin.real, cos_sin.imag
        turned = [pairs[..., 0] * c - pairs[..., 1] * s, pairs[..., 1] * c + pairs[..., 0] * s]
        x[:, : heads + kv_heads] = torch.stack(turned, -1).flatten(-2)
        for p, row in zip(positions, x, strict=True):
            self.keys[spec.layer][p] = row[heads : heads + kv_heads]
            self.values[spec.layer][p] = row[heads + kv_heads :]
        return torch.stack(
            [self.row(spec, p, row[:heads]) for p, row in zip(positions, x, strict=True)]
        )

    def row(self, spec: AttentionSpec, p: int, q_HE: Tensor) -> Tensor:
        far = spec.window or 1 << 60
        near = p // far * far if spec.chunked else p - far + 1
        seen = sorted(k for k in self.keys[spec.layer] if near <= k <= p)
        out, total = [], torch.zeros(len(seen))
        for head, q in enumerate(q_HE):
            j = head * spec.num_kv_heads // spec.num_heads
            scores = [self.keys[spec.layer][k][j] @ q * spec.scale for k in seen]
            if spec.cap:
                scores = [spec.cap * (s / spec.cap).tanh() for s in scores]
            if spec.sinks is not None:
                scores.append(spec.sinks[head])
            share = torch.stack(scores).softmax(0)[: len(seen)]
            total += share / spec.num_heads
            out.append(
                sum(w * self.values[spec.layer][k][j] for w, k in zip(share, seen, strict=True))
            )
        if p in self.watched:
            known = self.shares.setdefault(spec.layer, [0.0] * len(self.tokens))
            for k, w in zip(seen, total.tolist(), strict=True):
                known[k] += w
        return torch.cat(out)  # type: ignore[arg-type]
