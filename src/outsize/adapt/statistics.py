"""What goes into a model's linear maps on a text: second moments of each map's input, layer by layer.

The text's states go through one layer at a time, so that only that layer's moments exist: a matrix of width x
width numbers for each input, four a layer, which for all layers together would be larger than the model.

The first tokens of a text have states unlike all others (attention rests on them), and there are few of them:
they are measured apart, on many short sequences, and mixed in with a weight of their own. Without them, an
error there costs more than all others save (Q3_K's KL .44 -> .58 on SmolLM2).

Shapes: B sequences, T tokens, D width of the stream, K inputs of a map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from outsize.adapt.change import AS_IS, Change
from outsize.adapt.trainable import Rows, TrainableModel

FIRST, WEIGHT = (
    4,
    1 / 32,
)  # positions that are first, and what they count: as if texts had 128 tokens
LENGTH = 512  # tokens of a sequence
SHORT = 384  # sequences of first positions
AT_ONCE = 2048  # tokens
TENSORS = ("qkv", "o", "gate_up", "down")


class Moments(Change):
    """Sums of x x^T for each map's input of a layer, of positions from `skip` on."""

    def __init__(self, skip: int) -> None:
        self._skip, self.counts = skip, dict.fromkeys(TENSORS, 0)
        self.sums: dict[str, Tensor] = {}

    def weight(self, w: Tensor, x: Tensor, layer: int, name: str) -> Tensor:
        rows = x[:, self._skip :].flatten(0, 1).float()
        if name not in self.sums:
            self.sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
        self.sums[name].addmm_(rows.T, rows)
        self.counts[name] += len(rows)
        return w

    def mean(self, name: str) -> Tensor:
        return self.sums[name] / self.counts[name]


class States:
    """Sequences of one length on their way through the layers."""

    def __init__(self, model: TrainableModel, ids_BT: Tensor) -> None:
        self._model, self.layer = model, 0
        at_once = max(1, AT_ONCE // ids_BT.shape[1])
        self.parts = [model.embed(ids) for ids in ids_BT.split(at_once)]

    def advance(self, change: Change = AS_IS) -> None:
        """Go through the next layer."""
        layers = range(self.layer, self.layer + 1)
        for i, h_BTD in enumerate(self.parts):
            self.parts[i] = self._model.through(causal(h_BTD), layers, change)
        self.layer += 1

    def ends(self, change: Change = AS_IS) -> Tensor:
        """(tokens, D): what the head would multiply, with a change in what is left to go through."""
        rest = range(self.layer, self._model.description.num_layers)
        ends = [self._model.through(causal(h), rest, change) for h in self.parts]
        return torch.cat([self._model.normed(h).flatten(0, 1) for h in ends])


def causal(h_BTD: Tensor) -> Rows:
    """Rows of whole sequences, each of which sees those before it."""
    count, length, _ = h_BTD.shape
    positions = torch.arange(length, device=h_BTD.device)
    allow = torch.ones(length, length, dtype=torch.bool, device=h_BTD.device).tril()
    return Rows(h_BTD, positions.expand(count, -1), allow.expand(count, -1, -1))


class Inputs:
    """The second moments of each layer's inputs, in the order of the layers."""

    def __init__(self, model: TrainableModel, tokens: Sequence[int], start: Sequence[int]) -> None:
        """`start`: tokens that every text begins with."""
        self._long = States(model, sequences(tokens, start, LENGTH))
        short = sequences(tokens, start, FIRST)
        every = max(1, len(short) // SHORT)
        self._short = States(model, short[::every][:SHORT])

    def next(self) -> dict[str, Tensor]:
        """(K, K) fp32 for each tensor of the next layer, on the model's device."""
        rest, first = Moments(FIRST), Moments(0)
        with torch.inference_mode(), bf16_products():
            self._long.advance(rest)
            self._short.advance(first)
        return {
            name: (1 - WEIGHT) * rest.mean(name) + WEIGHT * first.mean(name) for name in rest.sums
        }


def sequences(tokens: Sequence[int], start: Sequence[int], length: int) -> Tensor:
    """(B, length) of whole sequences, each with its start."""
    each = length - len(start)
    count = len(tokens) // each
    body = torch.tensor(tokens[: count * each]).view(count, each)
    return torch.cat([torch.tensor(start, dtype=torch.long).expand(count, -1), body], dim=1)


@contextmanager
def bf16_products() -> Iterator[None]:
    """Matrices of fp32 that hold bf16 numbers are multiplied as such where there are instructions for it:
    the same sums, three times sooner."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
