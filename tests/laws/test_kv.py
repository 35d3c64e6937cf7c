"""KV law: truncate then append equals never having appended; layers are ragged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outsize.engine.model import Model
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.kv.kv import KV


def entries(positions: range, salt: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    base = torch.tensor([p + 1000.0 * salt for p in positions])[:, None, None]
    heads = torch.arange(2.0)[:, None] / 8 + torch.arange(4.0) / 16
    return base + heads, heads - base


def make() -> KV:
    return KV(2, (2, 4), torch.float32)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 400)), min_size=1, max_size=6))
def test_truncate_then_append(steps: list[tuple[int, int]]) -> None:
    kv, twin = make(), make()
    length = 0
    for salt, (count, back) in enumerate(steps):
        kv.append(0, *entries(range(length, length + 7), salt=99), range(length, length + 7))
        kv.truncate(length)  # as if the seven had never been
        new = range(length, length + count)
        for cache in (kv, twin):
            cache.append(0, *entries(new, salt), new)
        assert torch.equal(kv.view(0), twin.view(0))
        assert kv.positions[0] == twin.positions[0]
        length = max(0, length + count - back)
        kv.truncate(length)
        twin.truncate(length)
    assert len(kv.positions[1]) == 0


def test_layers_are_ragged() -> None:
    kv = make()
    kv.append(0, *entries(range(10)), range(10))
    kv.append(1, *entries(range(2, 8, 2)), range(2, 8, 2))
    kv.truncate(5)
    assert list(kv.positions[0]) == [0, 1, 2, 3, 4]
    assert list(kv.positions[1]) == [2, 4]


def test_keep() -> None:
    kv = make()
    k, v = entries(range(6))
    kv.append(0, k, v, range(6))
    kv.keep(0, [1, 4])
    assert list(kv.positions[0]) == [1, 4]
    assert torch.equal(kv.view(0)[:2], k[[1, 4]].transpose(0, 1))
    assert torch.equal(kv.view(0)[2:], v[[1, 4]].transpose(0, 1))


def test_nbytes_counts_what_is_held() -> None:
    kv = make()
    assert kv.nbytes == 0
    kv.append(0, *entries(range(3)), range(3))
    assert kv.nbytes == 4 * 256 * 4 * 4


def test_a_cache_that_was_filled_from_elsewhere_goes_on_alike(
    open_tiny: Callable[..., Model],
) -> None:
    """Entries that another rank, or a file of an earlier prompt, brings are as good as computed ones."""
    t = open_tiny("qwen3", "int8").transformer
    ours, theirs = t.new_kv(), t.new_kv()
    full(t, [Span(0, range(20, 60))], [ours])
    for layer, positions in enumerate(ours.positions):
        k_JSE, v_JSE = ours.view(layer).chunk(2)
        theirs.append(layer, k_JSE.transpose(0, 1), v_JSE.transpose(0, 1), positions)
    (one,), (other,) = (full(t, [Span(40, [7])], [kv]) for kv in (ours, theirs))
    assert torch.equal(one.logits_KV, other.logits_KV)


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 60), min_size=2), st.data())
def test_entries_are_sorted_in_whenever_they_come(positions: set[int], data: st.DataObject) -> None:
    late = data.draw(st.sets(st.sampled_from(sorted(positions)), min_size=1))
    kv, twin = make(), make()
    k, v = entries(range(61))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("outsize.kv.kv.MOVED", 7)
        for some in (sorted(positions - late), sorted(late)):
            kv.append(0, k[some], v[some], some)
    twin.append(0, k[sorted(positions)], v[sorted(positions)], sorted(positions))
    assert kv.positions[0] == twin.positions[0]
    assert torch.equal(kv.view(0), twin.view(0))
