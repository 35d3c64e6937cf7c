"""Does quantization change which neurons of a ReLU model fire (LLM in a flash, section 6 of its note)?

    python -m experiments.quality.neurons_quantized PACK TEXT NAME -o RAW.jsonl

PACK is one of `outsize adapt relu`, whose feed-forwards have eight bits. One row for each encoding that its
gate, up and down are put into: the share of neurons that fire on sequences of TEXT, of those the share that
fire as before, and the perplexity."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from experiments.runs import arguments, record
from outsize.adapt import rewrite
from outsize.adapt.change import Change
from outsize.adapt.sparsity.words import words
from outsize.adapt.statistics import causal
from outsize.adapt.trainable import TrainableModel, matmul_type
from outsize.model_config import Description
from outsize.pack import fetch
from outsize.progress import silent

CPU = torch.device("cpu")
KINDS = "", "int4-32", "int4-64", "palette3-fp16"


class Firing(Change):
    """Feed-forwards in another encoding ("": as they are), and which of their neurons fire, in order."""

    def __init__(self, kind: str) -> None:
        self._kind, self._made = kind, dict[tuple[int, str], Tensor]()
        self.fires: list[Tensor] = []

    def weight(self, w: Tensor, x: Tensor, layer: int, name: str) -> Tensor:
        if name not in ("gate_up", "down") or not self._kind:
            return w
        if (layer, name) not in self._made:
            self._made[layer, name] = rewrite.decoded(w, self._kind).to(w.dtype)
        return self._made[layer, name]

    def inner(self, gate_up: Tensor, d: Description) -> Tensor:
        self.fires.append(gate_up.chunk(2, dim=-1)[0] > 0)
        return super().inner(gate_up, d)


@torch.no_grad()
def main() -> None:
    a: Any = arguments(__doc__, "pack", "text", "name", sequences=6, length=256, tokens=16384)
    pack = fetch.find(a.pack)
    assert pack is not None
    model = TrainableModel(pack, CPU, matmul_type(CPU), silent)
    ids_BT = words(pack, [Path(a.text)], a.tokens, a.length).held_out_BT[: a.sequences]
    before: list[Tensor] = []
    for kind in KINDS:
        change, loss = Firing(kind), 0.0
        for ids in ids_BT.split(1):
            states, _ = model.run(causal(model.embed(ids)), None, change)
            logits = model.logits(states[0, :-1]).float()
            loss += float(cross_entropy(logits, ids[0, 1:], reduction="sum"))
        fires, before = change.fires, before or change.fires
        total = sum(int(f.sum()) for f in fires)
        same = sum(int((f & b).sum()) for f, b in zip(fires, before, strict=True))
        count = ids_BT.numel() - len(ids_BT)
        row = {
            "model": a.name, "encoding": kind or "as it is", "tokens": count,
            "fires": total / sum(f.numel() for f in fires),
            "kept": same / sum(int(b.sum()) for b in before), "perplexity": math.exp(loss / count),
        }  # fmt: skip
        record(row, a.output)


if __name__ == "__main__":
    main()
