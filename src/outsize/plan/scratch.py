"""Scratch lending: memory that only long prompts compute in is idle while tokens are decoded one by one, so
streamed layers get more slots there, and reads run further ahead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from outsize.pack.outline import Outline
from outsize.pack.tables import TableHeader
from outsize.storage.buffers import huge_bytes
from outsize.weights.residency import Share

STEP = 2 << 20  # bytes that a step of a few tokens computes in, with no draft tokens


def lent_bytes(o: Outline, scratch: int, fragments: float) -> int:
    """Bytes of a plan's scratch that decoding does not need: `fragments` times less, since an allocator does
    not return its holes, and less what a step needs."""
    return max(0, int(scratch / fragments) - max(STEP, o.step_scratch))


def lend(o: Outline, shares: Mapping[str, Share], size: int) -> dict[str, Share]:
    """Add slots of `size` bytes in all, one by one to the table that reads the least far ahead."""
    out = dict(shares)
    tables = [t for t in o.tables if t.kind == "layers" and shares[t.name].ring]
    # What long spans alone read is read while they need the scratch themselves.
    tables = [t for t in tables if not o.is_for_prompts(t)]

    def ahead(t: TableHeader) -> tuple[float, int]:
        return (out[t.name].ring + out[t.name].lent) / len(t.keys), -t.stride

    while tables:
        t = min(tables, key=ahead)
        more = replace(out[t.name], lent=out[t.name].lent + 1)
        tried = out | {t.name: more}
        if _bytes(tables, tried) > size or more.lent + more.ring + len(more.pinned) > len(t.keys):
            break
        out = tried
    return out


def _bytes(tables: Sequence[TableHeader], shares: Mapping[str, Share]) -> int:
    return sum(huge_bytes(shares[t.name].lent * t.stride) for t in tables)
