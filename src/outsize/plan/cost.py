"""Predict tokens/s and the time to the first token of a placement: a pass takes max(reading, computing).

Computing is measured, once for a model's shapes, on one random layer of each table; reading is the bytes that
are not resident over the disk's measured rate for such reads. All times in seconds.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace

from outsize.pack.kinds.kind import kinds
from outsize.pack.outline import Outline, PagedNeurons, head_of
from outsize.pack.tables import TableHeader
from outsize.plan.fixed import routed
from outsize.plan.hit_rates import ALL_USED, BY_TEXT, PRIOR, HitRates
from outsize.plan.machine import Compute, Machine
from outsize.plan.placement import BY_ID, BY_PROMPT, BY_ROUTER, BY_TOKEN, Placement
from outsize.storage.tickets import PIECE

MISS_S = 150e-6  # from a reader's last byte to the computation that waits for it
# Fitted to capped runs of four models (docs/results/memory.md): what the shorter of reading and computing
# adds to the longer, since they never overlap wholly; and what a process's first prompt takes more than
# the same chunk again and again, in memory and with shapes that are new to the libraries.
UNHIDDEN, FRESH, FRESH_S = 0.25, 1.2, 0.05
# What a token takes beside layers and head: its embedding, the step's tables, choosing it and handing it out.
PASS_S = 1.5e-3
# Of paged neurons, beside multiplying: seconds a layer of predicting and choosing, and a bundle of finding it
# in its cache; bytes a second of putting bundles together (experiments/memory/neurons_cost.py); and seconds
# of making room for a bundle that misses, and handing its read out (neurons_chunks.py, beside it).
CHOOSE_S, BUNDLE_S, GATHERED = 5.2e-4, 1.8e-6, 12e9
MISSED_S = 13e-6


@dataclass(frozen=True, slots=True)
class NeuronReads:
    """Of a token: bundles that it computes, their bytes, in how many runs of neighbours, which are read at
    once, PIECE bytes at a time; and what a read takes more than its bytes do, in bytes."""

    bundles: float
    size: float
    runs: float
    start_bytes: float

    def reads(self, hit_rate: float) -> float:
        """Neighbours that are used together are in memory together, or missing: so it was measured
        (docs/results/neurons.md)."""
        return (self.runs + self.size / PIECE) * (1 - hit_rate)

    def more_bytes(self, hit_rate: float) -> float:
        """That would take as long to read as beginning these reads does."""
        return self.reads(hit_rate) * self.start_bytes


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
    neuron_reads: NeuronReads | None = None

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
        low, high = (self.reading_s(h) for h in self.hit_rates)
        return plain + high, plain + low

    def reading_s(self, hit_rate: float) -> float:
        """Seconds of reading what is routed, and is not in memory."""
        size, more_s = self.expert_bytes * (1 - hit_rate), 0.0
        if self.neuron_reads is not None:
            size += self.neuron_reads.more_bytes(hit_rate)
            more_s = self.neuron_reads.bundles * (1 - hit_rate) * MISSED_S
        return size / self.disk_bytes_per_s + more_s

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
    kept = [] if o.kv == "auto" else [o.kv]
    text = json.dumps([o.description.to_json(), tables, *kept], sort_keys=True)
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
    compute = behind(o, compute, prompt)
    count = {t.name: len(t.keys) for t in o.tables if t.name in compute.step_s}
    records = sum(
        len(o.table(g).keys) - len(s.pinned)
        for g, s in place.shares.items()
        if not kinds()[o.table(g).kind].routed and not o.is_for_prompts(o.table(g))
    )
    rate = machine.disk_bytes_per_s
    chunks = prompt / compute.chunk_tokens
    chunk_s = sum(_prompt_s(o, t, compute, chunks) for t in o.tables if t.name in compute.chunk_s)
    head_s = compute.step_s[head_of(o.description)] * count[head_of(o.description)]
    read_s = place.streamed / rate
    by_id = sum(size for _, tier, size in place.groups if tier == BY_ID)
    waits = MISS_S * records if place.streamed else 0.0
    missing = sum(size for _, tier, size in place.groups if tier in (BY_ROUTER, BY_TOKEN))
    total = sum(t.size for t in routed(o))
    rates = ALL_USED if rates is PRIOR and o.description.is_nested else rates
    if o.neurons is not None:
        rates = firing(o.neurons)
    elif o.description.has_table or o.description.token_width:
        rates, waits = BY_TEXT, waits + MISS_S
    return Cost(
        prompt_tokens=prompt,
        bytes_per_token=place.streamed,
        hit_rates=rates(1 - missing / total) if missing else None,
        hit_rates_from=rates.source if missing else "",
        expert_bytes=used_bytes(o),
        disk_bytes_per_s=rate,
        neuron_reads=neuron_reads(o),
        read_s=read_s + (2e-4 if by_id else 0.0),
        compute_s=step_s(o, compute) + waits + _gather_s(o),
        prompt_read_s=read_s + _prompt_bytes(o, place, prompt) / rate,
        prompt_compute_s=FRESH * chunk_s + FRESH_S + head_s + waits,
        prompt_rows_s=_rows_bytes(o, place, prompt) / rate,
    )


def _prompt_s(o: Outline, t: TableHeader, compute: Compute, chunks: float) -> float:
    """Seconds that a table's records compute for a prompt. Layers that share keys and values see its last
    token alone."""
    first = o.description.num_kv_layers
    last = sum(key >= first for key in t.keys) if t.kind == "layers" else 0
    return (len(t.keys) - last) * compute.chunk_s[t.name] * chunks + last * compute.step_s[t.name]


def step_s(o: Outline, compute: Compute) -> float:
    """Seconds of computing one token."""
    paged = 1.0 if o.neurons is None else o.neurons.computes
    return PASS_S + sum(
        compute.step_s[t.name] * used_records(o, t) * (paged if o.is_for_prompts(t) else 1.0)
        for t in o.tables
        if t.name in compute.step_s
    )


def behind(o: Outline, compute: Compute, tokens: int) -> Compute:
    """Computing times of a token that has so many before it."""
    steps = dict(compute.step_s)
    for t in (t for t in o.tables if t.name in compute.entry_s):
        seen = min(tokens, o.description.layers[t.keys[0]].window or tokens)
        more = (seen - compute.chunk_tokens) * compute.entry_s[t.name]
        steps[t.name] = max(0.0, steps[t.name] + more)
    return replace(compute, step_s=steps)


def used_bytes(o: Outline) -> int:
    """Bytes of routed records that a token computes with."""
    return sum(used_records(o, t) * t.stride for t in routed(o))


def _gather_s(o: Outline) -> float:
    """Seconds a token of choosing neurons and putting their matrices together."""
    if o.neurons is None:
        return 0.0
    bundles = sum(used_records(o, t) for t in o.tables if t.kind == "neurons")
    return o.description.num_layers * CHOOSE_S + bundles * BUNDLE_S + used_bytes(o) / GATHERED


def firing(paged: PagedNeurons) -> HitRates:
    """Of the cache of bundles, if those that fire most stay."""
    return HitRates("what was measured to fire", tuple((s, r, r) for s, r in paged.hit_rates))


def neuron_reads(o: Outline) -> NeuronReads | None:
    """None where neurons are not paged, or their add-on file says nothing of runs."""
    if o.neurons is None or not o.neurons.runs:
        return None
    found = [t for t in o.tables if t.kind == "neurons"]
    stride = sum(t.size for t in found) / sum(len(t.keys) for t in found)
    runs = o.neurons.runs * o.description.num_layers
    size = used_bytes(o)
    return NeuronReads(size / stride, size, runs, o.neurons.gap * stride)


def used_records(o: Outline, t: TableHeader) -> int:
    """Records of a table that a token computes with."""
    mixture = o.description.mixture
    if t.kind == "neurons" and o.neurons is not None:
        return round(len(t.keys) * o.neurons.fires)
    if t.kind == "tokens":
        return 1
    if t.kind != "experts" or mixture is None:
        return len(t.keys)
    return len(t.keys) // mixture.count * mixture.used


def _rows_bytes(o: Outline, place: Placement, prompt: int) -> int:
    """Bytes of embedding records that a prompt of so many tokens reads, if tokens are spread evenly."""
    table, share = o.table("embed"), place.shares["embed"]
    count, missing = len(table.keys), len(table.keys) - len(share.pinned)
    touched = 1 - (1 - 1 / count) ** prompt
    return int(missing * touched * table.stride)


def _prompt_bytes(o: Outline, place: Placement, prompt: int) -> int:
    """Bytes that a prompt reads beside what every pass does."""
    tier = BY_PROMPT if o.neurons is not None else BY_ROUTER
    found = sum(size for _, other, size in place.groups if other == tier)
    rows = sum(size for _, other, size in place.groups if other == BY_TOKEN)
    return found + min(rows, sum(prompt * t.stride for t in o.tables if t.kind == "tokens"))
