"""What one token computes, operation by operation: bytes that are read, floating-point operations, seconds.

Seconds of maps are measured on random matrices of those shapes, as the whole sub-layers are
(plan/compute_times.py); what a sub-layer takes beside its maps is attention, or norms and the activation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch

from outsize.kernels.backend import Backend
from outsize.kernels.plain import PLAIN
from outsize.model.layers import Linear
from outsize.model.lora import STACKS, Adapter, widths
from outsize.pack.outline import Outline, head_of
from outsize.pack.tables import TableHeader
from outsize.plan import cost
from outsize.plan.compute_times import IN_TURN, STEPS, first_matrix, random_records
from outsize.plan.machine import Compute
from outsize.plan.probe import median_s
from outsize.plan.whatif import ADAPTER
from outsize.storage.table import Weight, activation_type

MAPS = {
    "qkv": "query, key and value map", "o": "attention's output map",
    "gate_up": "gate and up map", "down": "down map",
}  # fmt: skip
ATTENTION, REST, HEAD, LOWRANK = "attention", "norms and activation", "head", "adapter"
BESIDE = "embedding, choosing a token"
ORDER = (MAPS["qkv"], ATTENTION, MAPS["o"], MAPS["gate_up"], MAPS["down"], REST, LOWRANK)


@dataclass(frozen=True, slots=True)
class Operation:
    """One kind of operation, of all layers together, for one token."""

    name: str
    bytes: int  # of weights, or of keys and values
    flop: int
    s: float

    def to_json(self) -> dict[str, object]:
        return asdict(self)


@torch.inference_mode()
def operations(
    o: Outline, compute: Compute, backend: Backend, tokens: int, rank: int | None
) -> list[Operation]:
    """In the order in which they run, of a token that has so many before it. `rank`: of an adapter."""
    found: dict[str, Operation] = {}
    compute, last = cost.behind(o, compute, tokens), Operation(BESIDE, 0, 0, cost.PASS_S)
    for op in (*_of_tables(o, compute, backend, tokens), *_of_adapter(o, backend, rank), last):
        before = found.get(op.name, Operation(op.name, 0, 0, 0.0))
        found[op.name] = Operation(
            op.name, before.bytes + op.bytes, before.flop + op.flop, before.s + op.s
        )
    names = (
        [n for n in ORDER if n in found]
        + sorted(found.keys() - {*ORDER, HEAD, BESIDE})
        + [HEAD, BESIDE]
    )
    return [found[name] for name in names]


def _of_tables(o: Outline, compute: Compute, backend: Backend, tokens: int) -> Iterator[Operation]:
    for t in o.tables:
        if t.name not in compute.step_s:
            continue
        if t.name == head_of(o.description):
            d = o.description
            yield Operation(
                HEAD, t.size, 2 * d.vocab_size * d.width, compute.step_s[t.name] * len(t.keys)
            )
        elif t.kind == "layers" and "router" not in t.tensors:
            yield from _of_layers(o, t, compute, backend, tokens)
        else:
            name, count = "experts" if t.kind == "experts" else "routers", cost.used_records(o, t)
            weights = sum(m.num_rows * m.width for ms in t.tensors.values() for m in ms)
            yield Operation(
                name, count * t.stride, 2 * count * weights, count * compute.step_s[t.name]
            )


def _of_layers(
    o: Outline, t: TableHeader, compute: Compute, backend: Backend, tokens: int
) -> Iterator[Operation]:
    """A sub-layer's maps, and what is left of its time."""
    count, left = len(t.keys), compute.step_s[t.name]
    records, dtype = random_records(t, backend, IN_TURN), activation_type(first_matrix(t))
    for name in (n for n in MAPS if n in t.tensors):
        took = min(left, _map_s([made[name] for made in records], dtype))
        left -= took
        flop = sum(2 * m.num_rows * m.width for m in t.tensors[name])
        size = sum(m.size for m in t.tensors[name])
        yield Operation(MAPS[name], count * size, count * flop, count * took)
    if "o" not in t.tensors:
        yield Operation(REST, 0, 0, count * left)
        return
    d = o.description.of_layer(t.keys[0])
    entries = 2 * d.num_kv_heads * d.head_dim * o.activation_bytes * tokens
    flop = 4 * d.num_heads * d.head_dim * tokens
    yield Operation(ATTENTION, count * entries, count * flop, count * left)


def _map_s(each: Sequence[tuple[Weight, ...]], dtype: torch.dtype) -> float:
    weights, turns = each[0], itertools.cycle([Linear(one) for one in each])
    width = weights[0].encoding.decode(weights[0].fields).shape[1]
    x = torch.randn(1, width, dtype=torch.float32, device="cpu").to(dtype)
    return median_s(lambda: next(turns)(x, False), STEPS)


def _of_adapter(o: Outline, backend: Backend, rank: int | None) -> Iterator[Operation]:
    """Low-rank additions to the maps of one layer, as often as there are layers."""
    if rank is None:
        return
    d, known = o.description, widths(o.description)
    factors = {
        f"0.{name}": tuple(
            torch.randn(*shape, dtype=torch.float32, device="cpu")
            for shape in ((rank, k), (n, rank))
        )
        for name, (n, k) in known.items()
    }
    pairs = {name: (a, b) for name, (a, b) in factors.items()}
    adapter, took = Adapter(ADAPTER, d, pairs, 1.0), 0.0
    own = PLAIN if o.activation_bytes == 4 else backend
    kind = torch.float32 if o.activation_bytes == 4 else torch.bfloat16
    for stack, projections in STACKS.items():
        matrix = adapter.factors(0, stack)
        assert matrix is not None
        inputs, outputs = known[projections[0]][1], sum(known[p][0] for p in projections)
        x, y = (torch.zeros(1, n, dtype=kind, device="cpu") for n in (inputs, outputs))
        took += median_s(partial(own.lowrank, matrix, x, y, slice(0, 1), False), STEPS)
    flop = sum(2 * rank * (n + k) for n, k in known.values())
    size = o.adapters.get(ADAPTER, 0)
    yield Operation(LOWRANK, size, d.num_layers * flop, d.num_layers * took)
