"""Two ways over a link that others use, too."""

from __future__ import annotations

from experiments.parallel.noise import rows
from outsize.parallel.programs import Prompt

SMALL = Prompt(5e-4, 1e-6, 3, 512, 512)


def test_rows_of_both_ways() -> None:
    found = list(rows(SMALL, "50Mbit/s,0.1ms", 240, 2, 40.0))
    assert [(r["way"], r["noise"]) for r in found] == [
        (way, noise) for way in ("gathered", "chain", "chain, even cuts") for noise in (False, True)
    ]
    for row in found:
        assert len(row["runs"]) == 2
        assert row["median_s"] > 0
