"""The page of `outsize bench prefill`: seconds to the first token against the prompt's length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from outsize.report import svg


def page(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """Curves of all ways, the same as shares of a prompt computed whole, and a table."""
    lengths = sorted({int(r["tokens"]) for r in rows})
    labels = [f"{n:,}" for n in lengths]
    seconds: dict[str, list[tuple[float, float]]] = {}
    shares: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        place = lengths.index(row["tokens"])
        seconds.setdefault(row["mode"], []).append((place, row["first_token_s"]))
        shares.setdefault(row["mode"], []).append((place, row["of_base"]))
    parts = [
        "<p>Lazy ways are lossy, and compared with <b>full</b>; warm ones have the bits of <b>cold</b>, and "
        "are compared with it.</p>",
        svg.lines(seconds, "tokens of the prompt", "seconds to the first token", labels),
        svg.lines(shares, "tokens of the prompt", "share of full or cold", labels),
    ]
    head = ("way", "tokens", "first token, s", "share", "reused", "MB read", "computed")
    shown = [
        [r["mode"], f"{r['tokens']:,}", f"{r['first_token_s']:.3f}", f"{r['of_base']:.1%}",
         f"{r['reused_tokens']:,}", f"{r['bytes_read'] / 1e6:,.0f}", f"{r['computed_share']:.0%}"]
        for r in rows
    ]  # fmt: skip
    return svg.page(title, [*parts, svg.table(head, shown)])
