"""What goes where: a budget and a model's headers -> which records stay, and what everything costs.

The fixed costs are those of the worst span that the context allows, not of the idle state.
Shapes in names of sizes: T tokens of context, C tokens of a chunk, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from outsize.errors import BudgetError, OptionError
from outsize.pack.kinds.kind import kinds
from outsize.pack.outline import Outline
from outsize.pack.tables import TableHeader
from outsize.plan.fixed import (
    FRAGMENTS,
    all_bytes,
    fixed_costs,
    kv_tokens,
    most_slots,
    routed,
    slot_bytes,
    token_bytes,
)
from outsize.plan.layers_off import note
from outsize.plan.placement import (
    BY_ID,
    BY_PROMPT,
    BY_ROUTER,
    BY_TOKEN,
    DISK,
    MEMORY,
    Placement,
)
from outsize.plan.scratch import lend, lent_bytes
from outsize.storage.buffers import HUGE, SMALL, huge_bytes
from outsize.system.address_space import bounds
from outsize.weights.residency import Share, all_of

MB = 1_000_000
KV_INT8 = (
    "keys and values are kept in 8 bits, which changes answers a little (lossy); --kv auto is exact"
)
RESERVE_SHARE, RESERVE = 0.01, 20 * MB  # page cache of libraries, page tables, kernel stacks
IN_FLIGHT, IN_FLIGHT_LEAST = 8 << 20, 4 << 20  # bytes read ahead to keep the disk busy
SHORTEST = 1024  # tokens of context that are always planned for, if the user asked for none
KV_SHARE = 0.1  # of the room for weights, where a context must be shortened
TOKENIZER_FACTOR = 8  # bytes in memory for a byte of tokenizer.json
TOKENIZER_PEAK = 23  # and while it is read


def tokenizer_bytes(o: Outline) -> int:
    return TOKENIZER_FACTOR * o.tokenizer_bytes


def opening_peak(o: Outline, runtime: int) -> int:
    """What the process takes for a moment, while the tokenizer is read."""
    return runtime + TOKENIZER_PEAK * o.tokenizer_bytes


def _rings(o: Outline, generous: bool) -> dict[str, int]:
    """Slots for streamed records, by table: as many layers ahead in each as keep the disk busy, or fewer.
    Unequal ones would not do: the shortest look ahead is where the computation waits."""
    layers = [t for t in o.tables if t.kind == "layers" and t.name != "final-0"]
    ahead = IN_FLIGHT if generous else IN_FLIGHT_LEAST
    least = HUGE if generous else 0
    depth = ahead * o.description.num_layers / sum(t.size for t in layers)
    out = {
        t.name: max(
            math.ceil(depth * len(t.keys) / o.description.num_layers), -(-least // t.stride)
        )
        for t in layers
    }
    head = o.table("embed" if o.description.tied else "head")
    out[head.name] = 1 + -(-ahead // 2 // head.stride)
    return {name: min(count, len(o.table(name).keys)) for name, count in out.items()}


def _ring_bytes(o: Outline, rings: Mapping[str, int]) -> int:
    return sum(huge_bytes(o.table(name).stride * count) for name, count in rings.items())


def _reserve(budget: int) -> int:
    return RESERVE + int(budget * RESERVE_SHARE)


def least_bytes(o: Outline, runtime: int, tokenizer: int, context: int) -> int:
    """The smallest budget that runs: nothing held but the final norm, one slot for each table."""
    need = sum(fixed_costs(o, runtime, tokenizer, context).values()) + o.table("final-0").size
    need += _ring_bytes(o, _rings(o, False)) + _least_routed(o) + RESERVE
    return max(int(need / (1 - RESERVE_SHARE)) + 1, opening_peak(o, runtime))


def giveable(o: Outline, p: Placement) -> int:
    """Of what a plan holds of the weights, the bytes that a run could do without."""
    needed = o.table("final-0").size + _ring_bytes(o, _rings(o, False)) + _least_routed(o)
    return max(0, p.held - needed)


def table_note(o: Outline) -> str:
    """What a table of fewer bits, or of a low rank, costs; "" where it keeps all."""
    found = [t for t in o.tables if t.kind == "tokens" and o.description.has_table]
    bits = {m.encoding for t in found for m in t.tensors["rows"]} - {"bf16"}
    memory = o.description.memory
    rank = memory is not None and bool(memory.ranks)
    if not bits and not rank:
        return ""
    kept = [*sorted(bits), *(["a low rank"] if rank else [])]
    return (
        f"the table of feed-forwards is kept in {' and '.join(kept)}, which changes answers (lossy)"
    )


def copy_bytes(o: Outline, copy: Outline) -> int:
    """Of slots for copies of a model's experts, out of another pack of it. Raises OptionError."""
    mixture, size = o.description.mixture, sum(t.size for t in routed(o))
    if mixture is None:
        raise OptionError(f"misses=copy: {o.name} has no experts; leave it out")
    there = sum(t.size for t in routed(copy))
    if copy.description != o.description or there >= size:
        raise OptionError(
            f"misses=copy: the experts of {copy.name} take {there / MB:,.0f} MB, those of {o.name} "
            f"{size / MB:,.0f} MB; copies must be of the same model and smaller: name another encoding"
        )
    return _least_routed(copy)


def _least_slots(o: Outline, t: TableHeader) -> int:
    return kinds()[t.kind].least_slots(o.description, t)


def _least_routed(o: Outline) -> int:
    counts = ((t, _least_slots(o, t)) for t in routed(o))
    return sum(huge_bytes(count * t.stride) + slot_bytes(t, count) for t, count in counts)


def _order(o: Outline) -> list[tuple[int, str, int]]:
    """(rank, table, record) in the order in which records are worth holding."""
    found: list[tuple[int, str, int]] = []
    for name, kind in kinds().items():
        tables = [t for t in o.tables if t.kind == name and not o.is_for_prompts(t)]
        found += kind.order(o.description, tables)
    return sorted(found, key=lambda entry: entry[0])


def _fill(o: Outline, room: int, rings: Mapping[str, int]) -> dict[str, Share]:
    """Hold as many records as fit; a table whose streamed records would all have slots is held whole."""
    held: dict[str, list[int]] = {t.name: [] for t in o.tables}
    held["final-0"] = [0]
    room -= _least_routed(o)
    closed: set[str] = set()
    for _, name, i in _order(o):
        table = o.table(name)
        if name in closed or table.stride > room:
            closed |= {name} if kinds()[table.kind].from_front else set()
            continue
        held[name].append(i)
        room -= table.stride
    out = _routed_shares(o, room)
    for t in (t for t in o.tables if t.name not in out):
        ring = rings.get(t.name, 0)
        whole = len(held[t.name]) + ring >= len(t.keys)
        pinned = tuple(range(len(t.keys))) if whole else tuple(sorted(held[t.name]))
        out[t.name] = Share(pinned, 0 if whole else ring)
    return out


def _routed_shares(o: Outline, room: int) -> dict[str, Share]:
    """What is left goes to the slots of what a router names, to each table by its size."""
    useful = {t.name: most_slots(o, t) for t in routed(o)}
    total = sum(useful[t.name] * t.stride for t in routed(o))
    out = {}
    for t in routed(o):
        least, most = _least_slots(o, t), useful[t.name]
        more = int(max(0, room) * most * t.stride / total)
        more = more * t.stride // (t.stride + slot_bytes(t, 1))
        given = huge_bytes(least * t.stride) + more
        out[t.name] = Share((), min(most, max(least, _slots_in(given, t.stride))))
    return out


def _slots_in(room: int, stride: int) -> int:
    """As many slots as fit, in huge pages where they are so large."""
    counts = (room // stride, room // HUGE * HUGE // stride, min(room, SMALL - 1) // stride)
    return max(n for n in counts if huge_bytes(n * stride) <= room)


def _choose_context(o: Outline, budget: int, runtime: int, tokenizer: int) -> int:
    """The longest, by halves, that leaves room for all weights; else one that takes a tenth of it."""
    longest = context = o.description.context
    room = budget - _reserve(budget)
    while context > 2 * SHORTEST:
        if room >= sum(fixed_costs(o, runtime, tokenizer, context).values()) + all_bytes(o):
            return context
        context //= 2
    base = sum(fixed_costs(o, runtime, tokenizer, SHORTEST).values())
    context = SHORTEST
    while (
        context < longest
        and 2 * context * token_bytes(o) <= KV_SHARE * (room - base)
        and 2 * context <= longest
    ):
        context *= 2
    return min(context, longest)


def place(
    o: Outline,
    budget: int,
    runtime: int,
    tokenizer: int,
    context: int | None,
    force: bool = False,
) -> Placement:
    """`runtime` and `tokenizer`: what those take; `context` None: as long as reasonable. Raises
    BudgetError with the table of what is needed."""
    chosen = context or _choose_context(o, budget, runtime, tokenizer)
    fixed = fixed_costs(o, runtime, tokenizer, chosen)
    least = least_bytes(o, runtime, tokenizer, chosen)
    if budget < least and not force:
        raise BudgetError(_too_little(o, fixed, least, budget, chosen))
    whole = sum(fixed.values()) + all_bytes(o) + RESERVE
    fixed["reserve"] = _reserve(min(budget, whole))
    room = budget - sum(fixed.values()) - o.table("final-0").size
    if room >= all_bytes(o):
        shares = {t.name: all_of(t, most_slots(o, t)) for t in o.tables}
        spare = room - all_bytes(o)
    else:
        idle = lent_bytes(o, fixed["scratch"], FRAGMENTS)
        shares, spare = lend(o, _stream(o, room), idle), 0
    for t in routed(o):
        fixed["cache policy"] += slot_bytes(t, len(shares[t.name].pinned) + shares[t.name].ring)
    notes = [KV_INT8] if o.kv == "int8" else []
    notes += [text for text in (note(o.description), table_note(o)) if text]
    notes += [o.neurons.note] if o.neurons is not None and o.neurons.note else []
    if context is None and chosen < o.description.context:
        notes.append(
            f"context shortened from {o.description.context:,} to {chosen:,} tokens to fit; "
            "--context asks for more"
        )
    if budget < least:
        notes.append(f"forced: {least / MB:,.0f} MB are needed, {budget / MB:,.0f} MB were given")
    groups = tuple(g for t in o.tables for g in _tiers(o, t, shares[t.name]))
    stored = kv_tokens(o, chosen) + spare // token_bytes(o)
    opening = opening_peak(o, runtime)
    return Placement(
        budget,
        chosen,
        least,
        fixed,
        shares,
        groups,
        stored,
        tuple(notes),
        opening,
        streams=o.streams,
    )


def _stream(o: Outline, room: int) -> dict[str, Share]:
    rings = _rings(o, True)
    if room < 4 * _ring_bytes(o, rings):
        rings = _rings(o, False)
    head = o.table("embed" if o.description.tied else "head")
    others = {name: count for name, count in rings.items() if name != head.name}
    if room >= _ring_bytes(o, others) + head.size + _least_routed(o):
        rings = others  # all of the head will be held, and needs no slots
    return _fill(o, room - _ring_bytes(o, rings), rings)


def _tiers(o: Outline, t: TableHeader, share: Share) -> Iterator[tuple[str, str, int]]:
    held = len(share.pinned) * t.stride + huge_bytes(share.ring * t.stride)
    yield t.name, MEMORY, held
    missing = len(t.keys) - len(share.pinned)
    if kinds()[t.kind].routed:
        if share.ring < len(t.keys):
            tier = BY_TOKEN if t.kind == "tokens" else BY_ROUTER
            yield t.name, tier, (missing - share.ring) * t.stride
    elif missing:
        by_id = t.name == "embed" and not o.description.tied
        tier = BY_PROMPT if o.is_for_prompts(t) else BY_ID if by_id else DISK
        yield t.name, tier, missing * t.stride


def _too_little(o: Outline, fixed: Mapping[str, int], least: int, budget: int, context: int) -> str:
    costs = dict(fixed) | {"slots": _ring_bytes(o, _rings(o, False)) + _least_routed(o)}
    table = ", ".join(f"{name} {size / MB:,.0f}" for name, size in costs.items())
    return (
        f"{o.name} needs at least {-(-least // MB):,} MB for {context:,} tokens of context "
        f"({table} MB); got {budget / MB:,.0f} MB: give more --memory, a shorter --context, "
        f"{'fewer --streams, ' if o.streams > 1 else ''}or --force"
        f"{bounds()}"
    )
