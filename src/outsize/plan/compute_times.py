"""How long a model computes: random records of each table, timed for a token and a chunk of a prompt.

A pass finds few of its weights in the processor's caches, since all the others were there in between. So a
token's time is taken of several records in turn, which are larger than these together, or all there are.
"""

from __future__ import annotations

import itertools
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
from outsize.storage.table import Weights, activation_type, views

STEPS, CHUNKS = 24, 2
IN_TURN = 64 << 20  # bytes of records, which is more than most processors' caches have


@torch.inference_mode()
def measure(o: Outline, backend: Backend, room: int = IN_TURN) -> Compute:
    """Time random records of each table, of up to `room` bytes or one: a second or two."""
    steps, chunks, entries = dict[str, float](), dict[str, float](), dict[str, float]()
    tokens = min(CHUNK, o.description.context - STEPS - 1)
    for t in o.tables:
        is_gate = t.name.startswith("ffn-") and not {"o", "gate_up"} & {*t.tensors}
        if t.kind == "experts" or (o.description.mixture is not None and is_gate):
            steps[t.name], chunks[t.name] = _expert_times(o, t, backend, tokens)
        elif t.kind == "layers" and t.name != "final-0":
            found = _sublayer_times(o, t, random_records(t, backend, room), tokens, backend)
            steps[t.name], chunks[t.name], entries[t.name] = found
        elif t.name == head_of(o.description):
            steps[t.name] = _head_time(o, random_records(t, backend, room))
    return Compute(steps, chunks, tokens, entries)


def random_records(t: TableHeader, backend: Backend, room: int = 0) -> list[Weights]:
    """Random codes and tame scales, the same in all records: as many as the table has, in up to `room` bytes,
    and one at least."""
    count = max(1, min(len(t.keys), room // t.stride, STEPS))
    raw = [buffer(t.stride)[0] for _ in range(count)]
    raw[0].random_(0, 256)
    for weight in (w for ws in views(raw[0], t, backend).values() for w in ws):
        for field in weight.fields.values():
            if field.dtype.is_floating_point:
                field.fill_(0.01)
    for one in raw[1:]:
        one.copy_(raw[0])
    return [views(one, t, backend) for one in raw]


def _sublayer_times(
    o: Outline, t: TableHeader, records: list[Weights], tokens: int, backend: Backend
) -> tuple[float, float, float]:
    """Of a token behind a chunk, of a chunk, and what each further token before it adds."""
    d, dtype = o.description, activation_type(first_matrix(t))
    sublayers = [_sublayer(d, key, dict(made)) for key, made in zip(t.keys, records, strict=False)]
    own = PLAIN if dtype == torch.float32 else backend
    is_attention, size = "o" in records[0], tokens + STEPS + 1
    kv = new_kv(d, dtype)
    kv = Int8KV(kv, backend.decode_entries) if o.kv == "int8" else kv
    layers = [d.layers[key] for key in t.keys[: len(records)]] if is_attention else []
    sources = {layer.shares for layer in layers if layer.shares is not None}
    for shared in sources:
        heads, numbers = d.kv_sizes[shared]
        zeros = torch.zeros(size, heads, numbers, dtype=dtype, device="cpu")
        kv.append(shared, zeros, zeros, range(size))
    h_TD = torch.randn(tokens, d.width, dtype=torch.float32, device="cpu")

    def step(positions: range, wide: bool) -> Step:
        angles, tokens = rotary_angles(d.rope_sizes, positions), h_TD[: len(positions)]
        rows, backend = Rows([Segment(kv, positions)], wide), own.wide if wide else own
        read = [tokens.to(dtype)]  # of a feed-forward that reads what attention did
        return Step(rows, angles, backend, tokens=TokenInputs(tokens), read=read)

    def chunk_at(first: int, sublayer: Runnable) -> None:
        sublayer.run([(h_TD, step(range(first, first + tokens), True))])

    def run_chunk() -> None:
        if not sources:
            kv.truncate(0)
        chunk_at(0, sublayers[0])

    rounds = -(-(STEPS + 1) // len(sublayers))

    def step_at(first: int) -> float:
        places = [i for i in range(first, first + rounds) for _ in sublayers]
        todo = [step(range(i, i + 1), False) for i in places]  # once a pass, for all layers
        turns = iter(zip(itertools.cycle(sublayers), todo, strict=False))

        def run() -> None:
            sublayer, one = next(turns)
            sublayer.run([(h_TD[:1], one)])

        return median_s(run, len(todo) - 1)

    chunk_s = median_s(run_chunk, CHUNKS)
    for sublayer in sublayers[1:] if is_attention else ():
        chunk_at(0, sublayer)
    near_s, further = step_at(tokens), tokens + rounds
    if not is_attention or sources or further + tokens + rounds > d.context:
        return near_s, chunk_s, 0.0
    for sublayer in sublayers:
        chunk_at(further, sublayer)
    return near_s, chunk_s, max(0.0, (step_at(further + tokens) - near_s) / further)


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
    d, mixture, made = o.description, o.description.mixture, dict(random_records(t, backend)[0])
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


def _head_time(o: Outline, records: list[Weights]) -> float:
    """Of one token's logits, put where the others are, and of finding the largest."""
    heads = [next(iter(made.values()))[0] for made in records]
    weight, turns = heads[0], itertools.cycle(heads)
    x_KD: Tensor = torch.randn(1, o.description.width, dtype=torch.float32, device="cpu")
    x_KD = x_KD if o.activation_bytes == 4 or gives_fp32(weight.encoding) else x_KD.bfloat16()

    out_KV = torch.empty(1, weight.num_rows, dtype=torch.float32, device="cpu")

    def run() -> None:
        out_KV[:] = weight.encoding.linear(x_KD, next(turns).fields, False)[:, : weight.num_rows]
        out_KV.argmax(-1)

    return median_s(run, STEPS)
