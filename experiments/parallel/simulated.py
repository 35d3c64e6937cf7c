"""A real model cut into ranks within one process, a transformers model in fp32: each rank's parts of every
sub-layer, added up as any collective would, or not at all (sync_points.py measures with it)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from outsize.parallel.collective import Point
from outsize.parallel.dropped import Drop, message
from outsize.parallel.exact import sum_in_order
from outsize.parallel.lowbit import Codec

CHUNK = 256  # tokens of a sequence
Sums = Callable[[list[Tensor], Point], Tensor]
Seen = Callable[[int, str, list[Tensor], Tensor], None]


def exact(parts: list[Tensor], at: Point) -> Tensor:
    return sum_in_order([p.bfloat16() for p in parts])


@dataclass
class Way:
    """How sums are taken. `drops`: by rank; `again`: is a part that was not summed added later (the paper),
    or never (a wrong version found in public code)? `seen`: is shown parts."""

    name: str
    sums: Sums = exact
    drops: Sequence[Drop] = ()
    again: bool = True
    seen: Seen | None = None


class Ranks:
    """A model of transformers', cut as tensor parallelism cuts it."""

    def __init__(self, model: Any, world: int) -> None:
        self.model = model
        self.world, c = world, self.model.config
        kv, group = c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads
        size = self.model.model.layers[0].self_attn.o_proj.weight.shape[1] // c.num_attention_heads
        self.each, self.keys = group * size, _cut(kv, world)
        self.orders: dict[
            int, Sequence[int]
        ] = {}  # of key heads, of layers where it is not the model's
        self.neurons = [slice(a, b) for a, b in _cut(c.intermediate_size, world)]
        self.outputs = [layer.self_attn.o_proj.weight.data for layer in self.model.model.layers]
        for layer in self.model.model.layers:
            assert layer.self_attn.o_proj.bias is None
            layer.self_attn.o_proj = nn.Identity()

    def logits(self, ids_T: Tensor, way: Way) -> Tensor:
        inner = self.model.model
        x, at = inner.embed_tokens(ids_T[None]), torch.arange(len(ids_T))[None]
        angles = inner.rotary_emb(x, at)
        mask = torch.full((len(ids_T), len(ids_T)), float("-inf")).triu(1)[None, None]
        for index in range(len(inner.layers)):
            x = self.layer(index, x, way, (angles, mask, at))
        return self.model.lm_head(inner.norm(x))[0]

    def layer(self, index: int, x: Tensor, way: Way, where: tuple[Any, Tensor, Tensor]) -> Tensor:
        layer = self.model.model.layers[index]
        normed = layer.input_layernorm(x)
        angles, mask, at = where
        out = layer.self_attn(
            hidden_states=normed, position_embeddings=angles, attention_mask=mask, position_ids=at
        )[0][0]
        parts = self.parts(self.by_head(index, out))
        if way.seen is not None:
            way.seen(index, "attention", parts, normed[0])
        if way.drops and index in way.drops[0]:
            return self.dropped(index, x[0], parts, way, normed[0])[None]
        h = x[0] + way.sums(parts, Point(index, "attention"))
        ffn = [self.ffn(index, h, r) for r in range(self.world)]
        if way.seen is not None:
            way.seen(index, "ffn", ffn, h)
        return (h + way.sums(ffn, Point(index, "ffn")))[None]

    def by_head(self, index: int, out: Tensor) -> list[Tensor]:
        """What each key head's queries give of attention's output, in the order in which ranks hold them."""
        pieces, weights = (x.split(self.each, 1) for x in (out, self.outputs[index]))
        order = self.orders.get(index, range(len(pieces)))
        return [pieces[k] @ weights[k].T for k in order]

    def parts(self, heads: Sequence[Tensor]) -> list[Tensor]:
        return [sum_in_order(heads[a:b]) for a, b in self.keys]

    def dropped(
        self, index: int, x: Tensor, parts: list[Tensor], way: Way, normed: Tensor
    ) -> Tensor:
        out = []
        for r, part in enumerate(parts):
            ffn = self.ffn(index, way.drops[r].guess(index, x, part, normed), r)
            out.append(message(part, ffn) if way.again else ffn)
        summed = way.sums(out, Point(index, "block"))
        return x + summed + (0 if way.again else sum(parts) / self.world)

    def ffn(self, index: int, h: Tensor, rank: int) -> Tensor:
        layer, some = self.model.model.layers[index], self.neurons[rank]
        x, m = layer.post_attention_layernorm(h), layer.mlp
        inner = m.act_fn(x @ m.gate_proj.weight[some].T) * (x @ m.up_proj.weight[some].T)
        return inner @ m.down_proj.weight[:, some].T


def tokens(tokenizer: Any, text: str, chunks: int) -> Tensor:
    """(chunks, CHUNK) ids from the text's beginning."""
    ids = tokenizer(text[: chunks * CHUNK * 8])["input_ids"]
    return torch.tensor(ids[: chunks * CHUNK], dtype=torch.int64).view(chunks, CHUNK)


def _cut(count: int, world: int) -> list[tuple[int, int]]:
    ends = [round(count * r / world) for r in range(world + 1)]
    return list(pairwise(ends))


def losses(ranks: Ranks, chunks: Tensor, way: Way) -> tuple[list[float], Tensor]:
    """Mean loss of each chunk, and the most likely token at each place."""
    found, likely = [], []
    for ids in chunks:
        logits = ranks.logits(ids, way)
        found.append(float(nn.functional.cross_entropy(logits[:-1], ids[1:])))
        likely.append(logits.argmax(1))
    return found, torch.stack(likely)


def coded(codecs: Sequence[Codec], places: Sequence[str] = ("attention", "ffn", "block")) -> Sums:
    def sums(parts: list[Tensor], at: Point) -> Tensor:
        if at.place not in places:
            return exact(parts, at)
        packed = [codec.pack(p, at) for codec, p in zip(codecs, parts, strict=True)]
        return codecs[0].sum(packed, parts[0].shape[1], at)

    return sums


def zero_shot(layers: Sequence[int], world: int) -> list[Drop]:
    return [Drop(frozenset(layers))] * world
