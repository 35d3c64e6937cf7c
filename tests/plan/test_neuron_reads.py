"""Reads of a token's bundles in a plan: as many as runs of neighbours and pieces of them, and priced."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outsize.plan.cost import MISSED_S, Cost, NeuronReads
from outsize.storage.tickets import PIECE


@given(st.floats(0, 1e9), st.floats(0, 1e4), st.floats(0, 1))
def test_reads_fall_with_what_is_in_memory(size: float, runs: float, hit_rate: float) -> None:
    """From one for each run, and one more for each piece, down to none."""
    reads = NeuronReads(1.0, size, runs, 1.0)
    assert reads.reads(0.0) == pytest.approx(runs + size / PIECE)
    assert reads.reads(1.0) == 0
    assert 0 <= reads.reads(hit_rate) <= reads.reads(0.0) + 1e-9


def test_a_token_takes_longer_for_what_its_reads_cost() -> None:
    plain = Cost(32, 0, 0.0, 1e-3, 0.0, 0.0, 0.0, (0.0, 0.5), "here", 4 * PIECE, 1e9)
    more = replace(plain, neuron_reads=NeuronReads(100, 4 * PIECE, 96, 40_000))
    slow, fast = 1e-3 + 4 * PIECE / 1e9, 1e-3 + 2 * PIECE / 1e9
    assert plain.range_s == pytest.approx((fast, slow))
    each = 40_000 / 1e9 + MISSED_S
    assert more.range_s == pytest.approx((fast + 50 * each, slow + 100 * each))
    told = {"bundles": 100, "size": 4 * PIECE, "runs": 96, "start_bytes": 40_000}
    assert more.to_json()["neuron_reads"] == told
