"""Scratch lending: memory that only long prompts compute in is idle while tokens are decoded one by one, so
streamed layers get more slots there, and reads run further ahead; what they leave holds pieces of nested
experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from outsize.pack.outline import Outline
from outsize.pack.tables import TableHeader
from outsize.storage.buffers import HUGE, huge_bytes
from outsize.weights.residency import Share

STEP = 2 << 20  # bytes that a step of a few tokens computes in, with no draft tokens


def lent_bytes(o: Outline, scratch: int, fragments: float) -> int:
    """Bytes of a plan's scratch that decoding does not need: `fragments` times less, since an allocator does
    not return its holes, and less what a step needs."""
    return max(0, int(scratch / fragments) - max(STEP, o.step_scratch))


def lend(o: Outline, shares: Mapping[str, Share], size: int) -> dict[str, Share]:
    """Add slots of `size` bytes in all. A piece of nested experts that has one is read no more, a layer only
    if all that stream have: then layers go first."""
    layers = _to_layers(o, shares, size)
    if not o.pins_pieces:
        return layers
    streamed = [t for t in o.tables if t.kind == "layers" and layers[t.name].ring]
    if all(_slots(layers[t.name]) == len(t.keys) for t in streamed):
        return _to_pieces(o, layers, size - _bytes(streamed, layers))
    pieces = _to_pieces(o, shares, size)
    return _to_layers(o, pieces, size - _bytes(o.tables, pieces))


def _to_pieces(o: Outline, shares: Mapping[str, Share], size: int) -> dict[str, Share]:
    """Give slots to those that are used most."""
    out = dict(shares)
    for t in (t for t in o.tables if t.kind == "experts"):
        count = min(len(t.keys) - shares[t.name].ring, max(0, size) // HUGE * HUGE // t.stride)
        out[t.name] = replace(shares[t.name], lent=count)
        size -= huge_bytes(count * t.stride)
    return out


def _to_layers(o: Outline, shares: Mapping[str, Share], size: int) -> dict[str, Share]:
    """Give slots one by one to the table that reads the least far ahead."""
    out = dict(shares)
    tables = [t for t in o.tables if t.kind == "layers" and shares[t.name].ring]
    # What long spans alone read is read while they need the scratch themselves.
    tables = [t for t in tables if not o.is_for_prompts(t)]

    def ahead(t: TableHeader) -> tuple[float, int]:
        return (out[t.name].ring + out[t.name].lent) / len(t.keys), -t.stride

    while tables:
        t = min(tables, key=ahead)
        tried = out | {t.name: replace(out[t.name], lent=out[t.name].lent + 1)}
        if _bytes(tables, tried) > size or _slots(tried[t.name]) > len(t.keys):
            break
        out = tried
    return out


def _slots(share: Share) -> int:
    return len(share.pinned) + share.ring + share.lent


def _bytes(tables: Sequence[TableHeader], shares: Mapping[str, Share]) -> int:
    return sum(huge_bytes(shares[t.name].lent * t.stride) for t in tables)
