"""Reads of a token's bundles in a plan: as many as runs of missing neighbours, and priced."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outsize.plan.cost import Cost, NeuronReads


def test_runs_of_what_is_missing() -> None:
    """Against bundles that are in memory by chance: two in a hundred apart."""
    generator = torch.Generator().manual_seed(0)
    smooth = torch.randn(4000, 96, generator=generator).cumsum(1)
    chosen = smooth > smooth.median(1, keepdim=True).values
    begins = chosen & ~torch.cat([torch.zeros(4000, 1, dtype=torch.bool), chosen[:, :-1]], 1)
    bundles, runs = (float(x.sum(1).float().mean()) for x in (chosen, begins))
    for hit_rate in (0.0, 0.2, 0.5, 0.9, 1.0):
        missing = chosen & (torch.rand(chosen.shape, generator=generator) >= hit_rate)
        before = torch.cat([torch.zeros(4000, 1, dtype=torch.bool), missing[:, :-1]], 1)
        found = float((missing & ~before).sum(1).float().mean())
        expected = NeuronReads(bundles, runs, 0.0).reads(hit_rate)
        assert expected == pytest.approx(found, rel=0.02, abs=1e-9)


@given(st.floats(1, 100), st.floats(0, 1), st.floats(0, 1))
def test_no_more_reads_than_bundles(bundles: float, share: float, hit_rate: float) -> None:
    reads = NeuronReads(bundles, share * bundles, 1.0).reads(hit_rate)
    assert 0 <= reads <= bundles * (1 - hit_rate) + 1e-9


def test_a_token_takes_longer_for_what_its_reads_cost() -> None:
    plain = Cost(32, 0, 0.0, 1e-3, 0.0, 0.0, 0.0, (0.0, 0.5), "here", 4_000_000, 1e9)
    more = replace(plain, neuron_reads=NeuronReads(400, 100, 40_000))
    assert plain.range_s == pytest.approx((5e-3, 3e-3))
    assert more.range_s == pytest.approx((5e-3 + 4e-3, 3e-3 + 125 * 40_000 / 1e9))
    assert more.to_json()["neuron_reads"] == {"bundles": 400, "runs": 100, "start_bytes": 40_000}
