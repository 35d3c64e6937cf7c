"""What widths of nested experts read and how fast they are; whether the model pays as its own drafter."""

from __future__ import annotations

from dataclasses import dataclass

from outsize.pack.outline import FamilyRow, Outline
from outsize.plan.cost import UNHIDDEN, Cost
from outsize.plan.placement import BY_ROUTER, Placement

WORTH = 1.1  # times as fast, at least, that drafting must promise to be chosen unasked
ROW, DRAFTED = 0.1, 8  # what a further row of a step costs, in steps; most tokens drafted at once
AUTO_READS = 0.02  # of the weights: where a token reads no more, memory is said to be enough


@dataclass(frozen=True, slots=True)
class Predicted:
    """One width of the family, as planned."""

    share: float  # of the feed-forwards
    used_bytes: int  # that a token computes with
    read_bytes: int  # of them, from disk
    tokens_per_s: float
    perplexity: float
    kl: float


def predicted_widths(o: Outline, p: Placement, cost: Cost) -> tuple[Predicted, ...]:
    """Of each member; none without an add-on."""
    if o.nested is None:
        return ()
    out, whole = [], beside_bytes(o) + o.nested.total
    for row in o.nested.rows:
        used = beside_bytes(o) + int(row.share * o.nested.total)
        read = reads(o, p, row)
        read_s, compute_s = read / cost.disk_bytes_per_s, cost.compute_s * used / whole
        seconds = max(read_s, compute_s) + UNHIDDEN * min(read_s, compute_s)
        out.append(Predicted(row.share, used, read, round(1 / seconds, 3), row.perplexity, row.kl))
    return tuple(out)


def beside_bytes(o: Outline) -> int:
    """That each token computes with, beside nested experts."""
    layers = sum(t.size for t in o.tables if t.kind == "layers")
    return layers + o.table("embed" if o.description.tied else "head").size


def reads(o: Outline, p: Placement, row: FamilyRow) -> int:
    """Bytes that a token of this width reads from disk, if the pieces that it uses most stay; lent slots are
    there while tokens are decoded one by one."""
    missing = sum(size for _, tier, size in p.groups if tier == BY_ROUTER)
    assert o.nested is not None
    streamed = p.streamed
    for t in o.tables:
        share = p.shares[t.name]
        out = len(t.keys) - len(share.pinned) - share.ring
        if t.kind == "experts":
            missing -= share.lent * t.stride
        elif share.lent and share.lent >= out:  # all of it is in memory once it was read
            streamed -= (out + share.ring) * t.stride
    if missing <= 0:
        return streamed
    held = max(1, round(len(row.uses) * (1 - missing / o.nested.total)))
    return streamed + int(row.share * o.nested.total * (1 - row.uses[held - 1]))


@dataclass(frozen=True, slots=True)
class SelfDraft:
    """The width and the number of tokens that promise most, and how many times as fast they are."""

    share: float
    k: int
    gain: float


def drafting(o: Outline, p: Placement) -> SelfDraft:
    """How the model would best draft for itself, by how often narrow widths agreed with it and what they read
    or compute: tokens of a step against the time of its drafts and of itself."""
    best = SelfDraft(0.0, 1, 0.0)
    for row in () if o.nested is None else o.nested.rows[:-1]:
        draft, check, more = _costs(o, p, row)
        for k in range(1, DRAFTED + 1):
            tokens = sum(row.agrees**i for i in range(k + 1))
            gain = tokens * check / (k * draft + check * (1 + more * k))
            best = max(best, SelfDraft(row.share, k, gain), key=lambda one: one.gain)
    return best


def _costs(o: Outline, p: Placement, row: FamilyRow) -> tuple[float, float, float]:
    """Of a step at a narrow width and of a whole one, in bytes (of the disk, where any are read from it,
    else of memory); what a further row adds, as a share."""
    assert o.nested is not None
    whole = o.nested.rows[-1]
    if (check := reads(o, p, whole)) > AUTO_READS * o.size:
        return float(reads(o, p, row)), float(check), 0.0
    beside = beside_bytes(o)
    return beside + row.share * o.nested.total, float(beside + o.nested.total), ROW
