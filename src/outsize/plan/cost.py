"""Predict tokens/s and the time to the first token of a placement: a pass takes max(reading, computing).

Computing is measured, once for a model's shapes, on one random layer of each table; reading is the bytes that
are not resident over the disk's measured rate for such reads. All times in seconds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from outsize.encoding.find import gives_fp32
from outsize.kernels.attention import CHUNK
from outsize.kernels.backend import Backend
from outsize.kernels.norm import RMSNorm
from outsize.kernels.plain import PLAIN
from outsize.kernels.rows import Rows, Segment
from outsize.kv.kv import KV
from outsize.model.ffn.dense import Dense
from outsize.model.ffn.experts import Router, SharedExpert
from outsize.model.layers import Linear
from outsize.model.step import Step
from outsize.model.sublayer import attention_sublayer, ffn_sublayer, shared_expert
from outsize.model.transformer import rotary_angles
from outsize.pack.outline import Outline
from outsize.pack.tables import Matrix, TableHeader
from outsize.plan.fixed import routed
from outsize.plan.hit_rates import ALL_USED, PRIOR, HitRates
from outsize.plan.machine import Compute, Machine
from outsize.plan.placement import BY_ID, BY_PROMPT, BY_ROUTER, Placement
from outsize.plan.probe import median_s
from outsize.storage.buffers import buffer
from outsize.storage.table import Weight, activation_type, views

STEPS, CHUNKS = 24, 2
MISS_S = 150e-6  # from a reader's last byte to the computation that waits for it
# Fitted to capped runs of four models (docs/results/memory.md): what the shorter of reading and computing
# adds to the longer, since they never overlap wholly; and what a process's first prompt takes more than
# the same chunk again and again, in memory and with shapes that are new to the libraries.
UNHIDDEN, FRESH, FRESH_S = 0.25, 1.2, 0.05
CHOOSE_S, GATHERED = (
    3e-4,
    3e9,
)  # of a layer's neurons: choosing them, and bytes a second of gathering


@dataclass(frozen=True, slots=True)
class Cost:
    """The prediction: for a token, and for the first token after a prompt of `prompt_tokens`."""

    prompt_tokens: int
    bytes_per_token: int
    read_s: float
    compute_s: float
    prompt_read_s: float
    prompt_compute_s: float
    prompt_rows_s: float  # embedding rows of the prompt, read before anything can be computed
    hit_rates: tuple[float, float] | None = (
        None  # expected of the expert cache, the least and the most
    )
    hit_rates_from: str = ""
    expert_bytes: int = 0  # that a token would read if none were in memory
    disk_bytes_per_s: float = 0.0

    @property
    def token_s(self) -> float:
        return sum(self.range_s) / 2

    @property
    def range_s(self) -> tuple[float, float]:
        """Seconds a token at the higher and at the lower hit rate of experts. Reads of experts wait for the
        router, so they come on top of computing."""
        plain = max(self.read_s, self.compute_s) + UNHIDDEN * min(self.read_s, self.compute_s)
        if self.hit_rates is None:
            return plain, plain
        low, high = (self.expert_bytes * (1 - h) / self.disk_bytes_per_s for h in self.hit_rates)
        return plain + high, plain + low

    @property
    def tokens_per_s(self) -> float:
        return 1 / self.token_s

    @property
    def first_token_s(self) -> float:
        return self.prompt_rows_s + max(self.prompt_read_s, self.prompt_compute_s)

    def to_json(self) -> dict[str, object]:
        return asdict(self) | {
            "tokens_per_s": round(self.tokens_per_s, 3),
            "first_token_s": round(self.first_token_s, 3),
            "tokens_per_s_range": [round(1 / s, 3) for s in reversed(self.range_s)],
        }


def key(o: Outline) -> str:
    """A hash of the shapes and encodings that computing times depend on."""
    tables = [(t.name, t.stride, {k: [m.encoding for m in ms] for k, ms in t.tensors.items()})
              for t in o.tables]  # fmt: skip
    # sorted: a pack just made has its own order
    text = json.dumps([o.description.to_json(), tables], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def predict(
    o: Outline,
    machine: Machine,
    place: Placement,
    compute: Compute,
    prompt: int,
    rates: HitRates = PRIOR,
) -> Cost:
    """The prediction for a placement. `rates`: hit rates of the expert cache."""
    count = {t.name: len(t.keys) for t in o.tables if t.name in compute.step_s}
    records = sum(
        len(o.table(g).keys) - len(s.pinned)
        for g, s in place.shares.items()
        if o.table(g).kind != "neurons" and not o.is_for_prompts(o.table(g))
    )
    rate = machine.disk_bytes_per_s
    chunk_s = sum(compute.chunk_s[name] * n for name, n in count.items() if name in compute.chunk_s)
    head_s = compute.step_s[_head(o)] * count[_head(o)]
    read_s = place.streamed / rate
    by_id = sum(size for _, tier, size in place.groups if tier == BY_ID)
    waits = MISS_S * records if place.streamed else 0.0
    missing = sum(size for _, tier, size in place.groups if tier == BY_ROUTER)
    prompts = sum(size for _, tier, size in place.groups if tier == BY_PROMPT)
    total = sum(t.size for t in routed(o))
    rates = ALL_USED if rates is PRIOR and o.is_nested else rates
    if o.neurons is not None:
        points = tuple((share, rate, rate) for share, rate in o.neurons.hit_rates)
        rates = HitRates("what was measured to fire", points)
    return Cost(
        prompt_tokens=prompt,
        bytes_per_token=place.streamed,
        hit_rates=rates(1 - missing / total) if missing else None,
        hit_rates_from=rates.source if missing else "",
        expert_bytes=used_bytes(o),
        disk_bytes_per_s=rate,
        read_s=read_s + (2e-4 if by_id else 0.0),
        compute_s=step_s(o, compute) + waits + _gather_s(o),
        prompt_read_s=read_s + (prompts if o.neurons is not None else missing) / rate,
        prompt_compute_s=FRESH * chunk_s * prompt / compute.chunk_tokens + FRESH_S + head_s + waits,
        prompt_rows_s=_rows_bytes(o, place, prompt) / rate,
    )


def step_s(o: Outline, compute: Compute) -> float:
    """Seconds of computing one token."""
    return sum(compute.step_s[t.name] * _used(o, t) for t in o.tables if t.name in compute.step_s)


def used_bytes(o: Outline) -> int:
    """Bytes of routed records that a token computes with."""
    return sum(_used(o, t) * t.stride for t in routed(o))


def _gather_s(o: Outline) -> float:
    """Seconds a token of choosing neurons and putting their matrices together."""
    if o.neurons is None:
        return 0.0
    return o.description.num_layers * CHOOSE_S + used_bytes(o) / GATHERED


def _used(o: Outline, t: TableHeader) -> int:
    """Records of a table that a token computes with."""
    mixture = o.description.mixture
    if t.kind == "neurons" and o.neurons is not None:
        return round(len(t.keys) * o.neurons.fires)
    if t.kind != "experts" or mixture is None:
        return len(t.keys)
    return len(t.keys) // mixture.count * mixture.used


def _rows_bytes(o: Outline, place: Placement, prompt: int) -> int:
    """Bytes of embedding records that a prompt of so many tokens reads, if tokens are spread evenly."""
    table, share = o.table("embed"), place.shares["embed"]
    count, missing = len(table.keys), len(table.keys) - len(share.pinned)
    touched = 1 - (1 - 1 / count) ** prompt
    return int(missing * touched * table.stride)


def _head(o: Outline) -> str:
    return "embed" if o.description.tied else "head"


@torch.inference_mode()
def measure(o: Outline, backend: Backend) -> Compute:
    """Time one random record of each table: a second or two, in no more memory than a run needs."""
    steps: dict[str, float] = {}
    chunks: dict[str, float] = {}
    tokens = min(CHUNK, o.description.context - STEPS - 1)
    for t in o.tables:
        if t.kind == "experts" or (
            not {"o", "gate_up"} & {*t.tensors} and t.name.startswith("ffn-")
        ):
            steps[t.name], chunks[t.name] = _expert_times(o, t, backend, tokens)
        elif t.kind == "layers" and t.name != "final-0":
            steps[t.name], chunks[t.name] = _sublayer_times(o, t, backend, tokens)
        elif t.name == _head(o):
            steps[t.name] = _head_time(o, t, backend)
    return Compute(steps, chunks, tokens)


def _random(t: TableHeader, backend: Backend) -> Mapping[str, tuple[Weight, ...]]:
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
    d, dtype = o.description, activation_type(_first_matrix(t))
    made = dict(_random(t, backend))
    sublayer = (attention_sublayer if "o" in made else ffn_sublayer)(d, t.keys[0], made)
    own = PLAIN if dtype == torch.float32 else backend
    kv = KV(t.keys[0] + 1, d.num_kv_heads, d.head_dim, dtype)
    h_TD = torch.randn(tokens, d.width, dtype=torch.float32, device="cpu")

    def step(positions: range, wide: bool) -> Step:
        angles = rotary_angles(d.ropes, d.head_dim, positions)
        return Step(Rows([Segment(kv, positions)], wide), angles, PLAIN if wide else own)

    chunk = step(range(tokens), True)

    def run_chunk() -> None:
        kv.truncate(0)
        sublayer(h_TD, chunk)

    chunk_s = median_s(run_chunk, CHUNKS)
    at = iter(range(tokens, tokens + STEPS + 1))

    def run_step() -> None:
        i = next(at)
        sublayer(h_TD[:1], step(range(i, i + 1), False))

    return median_s(run_step, STEPS), chunk_s


def _expert_times(o: Outline, t: TableHeader, backend: Backend, tokens: int) -> tuple[float, float]:
    """One expert, or one router and the expert that all tokens use, for a token and for its share of a
    chunk."""
    d, mixture, made = o.description, o.description.mixture, dict(_random(t, backend))
    assert mixture is not None
    if "gate_up" in made:
        ffn = Dense(Linear(made["gate_up"]), Linear(made["down"]), d.activation)
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
    one, many = Step(Rows([], False), {}, own), Step(Rows([], True), {}, PLAIN)
    return median_s(lambda: ffn(x_TD[:1], one), STEPS), median_s(lambda: ffn(x_TD, many), CHUNKS)


def _first_matrix(t: TableHeader) -> tuple[Matrix, ...]:
    return t.tensors["o" if "o" in t.tensors else "gate_up"]


def _head_time(o: Outline, t: TableHeader, backend: Backend) -> float:
    (weight,) = next(iter(_random(t, backend).values()))
    x_KD: Tensor = torch.randn(1, o.description.width, dtype=torch.float32, device="cpu")
    x_KD = x_KD if o.activation_bytes == 4 or gives_fp32(weight.encoding) else x_KD.bfloat16()
    return median_s(lambda: weight.encoding.linear(x_KD, weight.fields, False), STEPS)
