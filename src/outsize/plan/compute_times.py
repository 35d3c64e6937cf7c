"""How long a model computes: one random record of each table, timed for a token and a chunk of a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from outsize.encoding.find import gives_fp32
from outsize.kernels.attention import CHUNK
from outsize.kernels.backend import Backend
from outsize.kernels.norm import RMSNorm
from outsize.kernels.plain import PLAIN
from outsize.kernels.rows import Rows, Segment
from outsize.kv.int8 import Int8KV
from outsize.model.ffn.dense import Dense
from outsize.model.ffn.experts import Router, SharedExpert
from outsize.model.half import Runnable
from outsize.model.layers import Linear
from outsize.model.memory_sublayer import memory_sublayer
from outsize.model.step import Step, TokenInputs
from outsize.model.sublayer import attention_sublayer, ffn_sublayer, shared_expert
from outsize.model.token_sublayer import LayerEnd, TokenReader
from outsize.model.transformer import new_kv, rotary_angles
from outsize.model_config import Description
from outsize.pack.kinds.layers import BESIDE
from outsize.pack.outline import Outline, head_of
from outsize.pack.tables import Matrix, TableHeader
from outsize.plan.machine import Compute
from outsize.plan.probe import median_s
from outsize.storage.buffers import buffer
from outsize.storage.table import Weight, Weights, activation_type, views

STEPS, CHUNKS = 24, 2


@torch.inference_mode()
def measure(o: Outline, backend: Backend) -> Compute:
    """Time one random record of each table: a second or two, in no more memory than a run needs."""
    steps: dict[str, float] = {}
    chunks: dict[str, float] = {}
    tokens = min(CHUNK, o.description.context - STEPS - 1)
    for t in o.tables:
        is_gate = t.name.startswith("ffn-") and not {"o", "gate_up"} & {*t.tensors}
        if t.kind == "experts" or (o.description.mixture is not None and is_gate):
            steps[t.name], chunks[t.name] = _expert_times(o, t, backend, tokens)
        elif t.kind == "layers" and t.name != "final-0":
            steps[t.name], chunks[t.name] = _sublayer_times(o, t, backend, tokens)
        elif t.name == head_of(o.description):
            steps[t.name] = _head_time(o, t, backend)
    return Compute(steps, chunks, tokens)


def random_record(t: TableHeader, backend: Backend) -> Mapping[str, tuple[Weight, ...]]:
    """A record with random codes and tame scales."""
    raw, _ = buffer(t.stride)
    raw.random_(0, 256)
    made = views(raw, t, backend)
    for weight in (w for ws in made.values() for w in ws):
        for field in weight.fields.values():
            if field.dtype.is_floating_point:
                field.fill_(0.01)
    return made


def _sublayer_times(
    o: Outline, t: TableHeader, backend: Backend, tokens: int
) -> tuple[float, float]:
    d, dtype = o.description, activation_type(first_matrix(t))
    made = dict(random_record(t, backend))
    sublayer = _sublayer(d, t.keys[0], made)
    own = PLAIN if dtype == torch.float32 else backend
    shared, size = d.layers[t.keys[0]].shares, tokens + STEPS + 1
    kv = new_kv(d, dtype)
    kv = Int8KV(kv, backend.decode_entries) if o.kv == "int8" else kv
    if shared is not None and "o" in made:
        heads, numbers = d.kv_sizes[shared]
        zeros = torch.zeros(size, heads, numbers, dtype=dtype, device="cpu")
        kv.append(shared, zeros, zeros, range(size))
    h_TD = torch.randn(tokens, d.width, dtype=torch.float32, device="cpu")

    def step(positions: range, wide: bool) -> Step:
        angles, tokens = rotary_angles(d.rope_sizes, positions), h_TD[: len(positions)]
        rows, backend = Rows([Segment(kv, positions)], wide), own.wide if wide else own
        read = [tokens.to(dtype)]  # of a feed-forward that reads what attention did
        return Step(rows, angles, backend, tokens=TokenInputs(tokens), read=read)

    def run_chunk() -> None:
        if shared is None:
            kv.truncate(0)
        sublayer.run([(h_TD, step(range(tokens), True))])

    chunk_s = median_s(run_chunk, CHUNKS)
    at = iter(range(tokens, tokens + STEPS + 1))

    def run_step() -> None:
        i = next(at)
        sublayer.run([(h_TD[:1], step(range(i, i + 1), False))])

    return median_s(run_step, STEPS), chunk_s


def _sublayer(d: Description, layer: int, made: Weights) -> Runnable:
    """Half a layer; of one whose tokens are looked up, what it computes beside."""
    if "o" in made:
        return attention_sublayer(d, layer, made)
    if d.memory is None:
        make = partial(ffn_sublayer, d.of_layer(layer), layer)
        zeros = partial(_no_rows, d.token_width)
        reader = TokenReader(d, made, zeros) if d.token_width else None
        return make(made) if reader is None else LayerEnd(make(made), reader, 1.0)
    off = (layer,) if d.memory.is_table else ()
    return memory_sublayer(replace(d, memory=replace(d.memory, off=off)), layer, {}, made)


def _no_rows(width: int, step: Step) -> Tensor:
    """(T, W): in place of a table's rows, which are reads."""
    shape = len(step.rows.all_positions()), width
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


def _expert_times(o: Outline, t: TableHeader, backend: Backend, tokens: int) -> tuple[float, float]:
    """One expert, or one router and the expert that all tokens use, for a token and for its share of a
    chunk."""
    d, mixture, made = o.description, o.description.mixture, dict(random_record(t, backend))
    assert mixture is not None
    if "gate_up" in made:
        ffn = Dense((Linear(made["gate_up"]), Linear(made["down"])), d.activation)
        rows, dtype = max(1, tokens * mixture.used // mixture.count), made["gate_up"]
        return _times(ffn, d.width, rows, activation_type(dtype), backend)
    norm = RMSNorm(
        torch.ones(d.width, dtype=torch.float32, device="cpu"), d.norm_eps, torch.float32
    )
    numbers_ND = torch.randn(mixture.count, d.width, dtype=torch.float32, device="cpu")
    choice = torch.zeros(mixture.count, dtype=torch.float32, device="cpu")
    router = Router(norm, numbers_ND, mixture, None, choice if mixture.choice_bias else None)
    x_TD = torch.randn(tokens, d.width, dtype=torch.float32, device="cpu")
    step_s = median_s(lambda: router(x_TD[:1], False), STEPS)
    chunk_s = median_s(lambda: router(x_TD, True), CHUNKS)
    if not mixture.shared:
        return step_s, chunk_s
    dtype = made["shared_gate_up"]
    more = _times(shared_expert(d, made), d.width, tokens, activation_type(dtype), backend)
    return step_s + more[0], chunk_s + more[1]


def _times(
    ffn: Dense | SharedExpert, width: int, rows: int, dtype: torch.dtype, backend: Backend
) -> tuple[float, float]:
    """Of a token, and of so many."""
    x_TD = torch.randn(rows, width, dtype=torch.float32, device="cpu").to(dtype)
    own = PLAIN if dtype == torch.float32 else backend
    one, many = Step(Rows([], False), {}, own), Step(Rows([], True), {}, own.wide)
    return median_s(lambda: ffn(x_TD[:1], one), STEPS), median_s(lambda: ffn(x_TD, many), CHUNKS)


def first_matrix(t: TableHeader) -> tuple[Matrix, ...]:
    return t.tensors[next(n for n in ("o", "gate_up", f"{BESIDE}gate_up") if n in t.tensors)]


def _head_time(o: Outline, t: TableHeader, backend: Backend) -> float:
    (weight,) = next(iter(random_record(t, backend).values()))
    x_KD: Tensor = torch.randn(1, o.description.width, dtype=torch.float32, device="cpu")
    x_KD = x_KD if o.activation_bytes == 4 or gives_fp32(weight.encoding) else x_KD.bfloat16()
    return median_s(lambda: weight.encoding.linear(x_KD, weight.fields, False), STEPS)
