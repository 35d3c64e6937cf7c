"""Low-rank additions to a model's linear maps (LoRA, arXiv 2106.09685), for some rows of a step: the base's
weights and all other rows are untouched, so without an adapter the bits are the base's.

A layer's maps are stacked as the engine runs them: qkv, o, gate_up, down. Narrow steps treat each row by
itself, so that a row's bits do not depend on its company.
Shapes: T rows, K inputs, N outputs, P stacked projections, R rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from outsize.errors import AdapterError
from outsize.kernels.structs import LowRankMatrix
from outsize.model_config import Description
from outsize.model_parts import Shard

STACKS = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
Factors = Mapping[str, tuple[Tensor, Tensor]]  # "{layer}.{projection}" -> A (R, K), B (N, R)
Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]  # the same, of the factors' shapes
MAKING = 8  # times a stack's bytes that making it takes for a moment


def widths(d: Description) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each projection."""
    heads, keys = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
    return {
        "q": (heads, d.width), "k": (keys, d.width), "v": (keys, d.width), "o": (d.width, heads),
        "gate": (d.ffn_width, d.width), "up": (d.ffn_width, d.width),
        "down": (d.width, d.ffn_width) if d.shard is None else (d.shard.outer, d.shard.inner),
    }  # fmt: skip


class Sliced(Mapping[str, tuple[Tensor, Tensor]]):
    """A rank's part of a model's factors: of B the rows of its outputs, of A the columns of its inputs."""

    def __init__(self, factors: Factors, shard: Shard, head_dim: int) -> None:
        self._factors, self._shard, self._head_dim = factors, shard, head_dim
        neurons, outputs = slice(*shard.neurons), slice(*shard.outputs)
        self._every, inner = slice(None), slice(None) if shard.cut == "gather" else neurons
        self._ffn = {
            "gate": (neurons, self._every), "up": (neurons, self._every), "down": (outputs, inner),
        }  # fmt: skip

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        a, b = self._factors[name]
        layer, _, projection = name.partition(".")
        if projection in self._ffn:
            rows, columns = self._ffn[projection]
            return a[:, columns], b[rows]
        index = self._heads(int(layer), projection in ("k", "v"))
        return (a[:, index], b) if projection == "o" else (a, b[index])

    def _heads(self, layer: int, are_keys: bool) -> slice | Tensor:
        """Numbers of this rank's heads in a layer: a run, where there is one order of all layers."""
        s, each = self._shard, self._head_dim
        if not s.orders:
            first, last = s.kv_heads if are_keys else s.heads
            return slice(first * each, last * each)
        each *= 1 if are_keys else s.num_heads // s.num_kv_heads
        numbers = [k * each + i for k in s.keys(layer) for i in range(each)]
        return torch.tensor(numbers, dtype=torch.int64, device="cpu")

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)


class OfLayers(Mapping[str, tuple[Tensor, Tensor]]):
    """The factors of some layers of a model, under the numbers that a rank gives these."""

    def __init__(self, factors: Factors, layers: range) -> None:
        self._factors, self._first = factors, layers.start
        self._names = [n for n in factors if int(n.partition(".")[0]) in layers]

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        layer, _, projection = name.partition(".")
        return self._factors[f"{int(layer) + self._first}.{projection}"]

    def __iter__(self) -> Iterator[str]:
        for name in self._names:
            layer, _, projection = name.partition(".")
            yield f"{int(layer) - self._first}.{projection}"

    def __contains__(self, name: object) -> bool:
        return name in list(self)

    def __len__(self) -> int:
        return len(self._names)


class Adapter:
    """One adapter's factors, for all layers of a model."""

    def __init__(
        self, name: str, d: Description, factors: Factors, scale: float, coarse: bool = False
    ) -> None:
        """Projections may be missing. `coarse`: keep codes of eight bits instead of bf16. The caller has
        checked the shapes (`check_shapes`)."""
        self.name = name
        self._stacks = {
            (layer, stack): made
            for layer in range(d.num_layers)
            for stack, projections in STACKS.items()
            if (made := _stack(layer, projections, d, factors, scale, coarse)) is not None
        }

    def factors(self, layer: int, name: str) -> LowRankMatrix | None:
        """What is added to a layer's stacked maps; None: nothing."""
        return self._stacks.get((layer, name))

    @property
    def nbytes(self) -> int:
        """What it holds."""
        return sum(stack.nbytes for stack in self._stacks.values())

    @cached_property
    def digest(self) -> str:
        """A hash of its factors: the same of two adapters that add the same."""
        found = hashlib.sha256()
        for place, stack in self._stacks.items():
            found.update(f"{place} {stack.ends}".encode())
            for factor in (stack.a, stack.b, stack.scale):
                if factor is not None:
                    found.update(factor.contiguous().flatten().view(torch.uint8).numpy().data)
        return found.hexdigest()


def stack_bytes(d: Description, shapes: Shapes) -> list[int]:
    """What each stack will hold in bf16, from shapes alone."""
    known, out = widths(d), []
    for layer in range(d.num_layers):
        for projections in STACKS.values():
            keys = [f"{layer}.{p}" for p in projections if f"{layer}.{p}" in shapes]
            rank = _even(max((shapes[k][0][0] for k in keys), default=0))
            inputs, outputs = known[projections[0]][1], sum(known[p][0] for p in projections)
            out.append(2 * rank * (len(projections) * inputs + outputs))
    return out


def _even(rank: int) -> int:
    return -(-rank // 2) * 2


def check_shapes(name: str, d: Description, shapes: Shapes) -> None:
    """Raises AdapterError where a shape is not the model's."""
    known, layers = widths(d.whole), d.num_layers if d.shard is None else d.shard.num_layers
    for key, (a, b) in shapes.items():
        layer, _, projection = key.partition(".")
        want = known.get(projection)
        if want is None or not layer.isdigit() or int(layer) >= layers:
            raise AdapterError(
                f"{name} changes {key}, which this model does not have; train it again"
            )
        if (b[0], a[1]) != want or a[0] != b[1]:
            raise AdapterError(
                f"{name}: {key} has factors {b} x {a}, this model's map is "
                f"{want[0]} x {want[1]}; it belongs to another model"
            )


def _stack(
    layer: int,
    projections: Sequence[str],
    d: Description,
    factors: Factors,
    scale: float,
    coarse: bool,
) -> LowRankMatrix | None:
    """Projections that are missing, or have a lower rank, are filled up with zeros."""
    found = {p: factors[f"{layer}.{p}"] for p in projections if f"{layer}.{p}" in factors}
    if not found:
        return None
    rank = _even(max(a.shape[0] for a, _ in found.values()))
    known = widths(d)
    sizes = [known[p] for p in projections]
    kind = torch.float32 if coarse else torch.bfloat16
    a_PRK = torch.zeros(len(projections), rank, sizes[0][1], dtype=kind, device="cpu")
    split = [torch.zeros(rows, rank, dtype=kind, device="cpu") for rows, _ in sizes]
    for i, projection in enumerate(projections):
        if projection in found:
            a, b = found[projection]
            a_PRK[i, : len(a)] = a
            split[i][:, : b.shape[1]] = b.float() * scale
    return _packed(a_PRK, split, coarse)


def _packed(a_PRK: Tensor, b_NR: Sequence[Tensor], coarse: bool) -> LowRankMatrix:
    """As they are kept. A code's step is that of its row of A, or of its column of B."""
    scale_R = None
    if coarse:
        a_PRK, a_step = _codes(a_PRK, 2)
        b_NR, b_steps = zip(*[_codes(b, 0) for b in b_NR], strict=True)
        scale_R = (a_step.flatten() * torch.cat([s.flatten() for s in b_steps])).contiguous()
    kind, pair = (torch.int8, torch.int16) if coarse else (torch.bfloat16, torch.int32)
    a_RK = a_PRK.flatten(0, 1).to(kind)
    # Pairs of ranks are moved as one number, several times as fast.
    pairs_NP = torch.cat(list(b_NR)).to(kind).view(pair)
    paired = pairs_NP.t().contiguous().view(kind).unflatten(1, (-1, 2))
    ends = tuple(accumulate(len(b) for b in b_NR))
    return LowRankMatrix(a_RK, paired, scale_R, ends)


def _codes(w: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Whole numbers to 127, and what one of them means along `dim`."""
    step = w.abs().amax(dim, keepdim=True) / 127
    return (w / step.clamp_min(torch.finfo(torch.float32).tiny)).round(), step
