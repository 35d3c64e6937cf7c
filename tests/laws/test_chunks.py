"""Chunks of bundles: the best set for what its reads cost, found exactly; the same by C and by Python; at no
cost, those above the threshold; whatever they cost, all that an exact predictor names."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outsize.adapt.sparsity import rule
from outsize.adapt.sparsity.rule import ALL, Choice, fitted, parse, quantile, runs
from outsize.errors import OptionError
from outsize.home import home as home_folder
from outsize.kernels.backend import Backend
from outsize.kernels.find import native_in
from outsize.kernels.gather import Pieces
from outsize.kernels.plain import PLAIN
from outsize.model.predictors.choose import Rule

INF, NAN = float("inf"), float("nan")
numbers = st.floats(-10, 10, width=32)


@pytest.fixture(params=["plain", "native"])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "plain":
        return PLAIN
    if (found := native_in(home_folder() / "native")) is None:
        pytest.skip("no C compiler on this machine")
    return found


def value_of(chosen: tuple[bool, ...], value: list[int], gap: int) -> int:
    begins = sum(b and not a for a, b in zip((False, *chosen[:-1]), chosen, strict=True))
    return sum(v for v, c in zip(value, chosen, strict=True) if c) - gap * begins


def test_the_best_of_all_sets(backend: Backend) -> None:
    """Whole numbers, whose sums are exact: no set of bundles is worth more, of any that there are; and of
    those that are worth as much it is one of no more bundles."""

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.integers(-5, 5), min_size=1, max_size=9), st.integers(0, 12))
    def check(value: list[int], gap: int) -> None:
        found = backend.chunks(torch.tensor([value], dtype=torch.float32), float(gap))
        mine = tuple(found[0].tolist())
        every = list(product((False, True), repeat=len(value)))
        most = max(value_of(c, value, gap) for c in every)
        assert value_of(mine, value, gap) == most
        assert sum(mine) == min(sum(c) for c in every if value_of(c, value, gap) == most)

    check()


def test_no_cost_is_importance_alone(backend: Backend) -> None:
    """Bit for bit, also of numbers that are tiny, endless or none."""
    odd = st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1e-38, INF, -INF, NAN])

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.one_of(numbers, odd), min_size=1, max_size=40), st.one_of(numbers, odd))
    def check(scores: list[float], threshold: float) -> None:
        if not abs(threshold) < INF:
            return
        some = torch.tensor([scores, scores[::-1]], dtype=torch.float32)
        alone = Rule(threshold).chosen(some, backend)
        assert torch.equal(Rule(threshold, 0.0).chosen(some, backend), alone)

    check()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 60), st.floats(0, 5, width=32), st.integers(0, 99))
def test_native_is_plain(rows: int, count: int, gap: float, seed: int) -> None:
    if (native := native_in(home_folder() / "native")) is None:
        pytest.skip("no C compiler on this machine")
    value = torch.randn(rows, count, generator=torch.Generator().manual_seed(seed))
    found = native.chunks(value, gap)
    assert torch.equal(found, PLAIN.chunks(value, gap))
    alone = torch.cat([native.chunks(v[None], gap) for v in value])
    assert torch.equal(found, alone)  # a row does not see the others


def test_an_exact_choice_leaves_nothing_out(backend: Backend) -> None:
    """And reads a bundle that is off only where that joins two reads."""
    scores = torch.tensor([[3.0, 0, 1e-30, 0, 0, 0, 2, 0]])
    for gap, due in ((0.0, "10100010"), (1.5, "11100010"), (4.0, "11111110"), (1e6, "11111110")):
        found = Rule(0.0, gap, True).chosen(scores, backend)[0]
        assert "".join(str(int(c)) for c in found) == due


def energies(seed: int = 0) -> Tensor:
    """As of a predictor: not negative, heavy at the end, and of neighbours that are alike."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, 64, generator=generator)
    return (x + torch.roll(x, 1, 1)).exp()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", ["energies", "logits"])
def test_the_share_that_was_asked_for(backend: Backend, share: float, shape: str) -> None:
    """On average of the tokens that it is set by; in fewer reads than by importance alone, which have more
    importance in them for what they cost."""
    if backend is PLAIN and share != 0.5:
        pytest.skip("one is enough: it is slow")
    scores = energies() if shape == "energies" else energies().log()
    alone = fitted(scores, share, Choice(), False, backend).chosen(scores, backend)
    chunks = fitted(scores, share, parse("chunks:3"), False, backend).chosen(scores, backend)
    assert abs(float(chunks.float().mean()) - share) < 0.02
    assert runs(chunks) < 0.8 * runs(alone)
    unit = quantile(scores, share) - quantile(scores, 1 - rule.WORTHLESS)
    worth = [
        float((scores * c).sum() / len(scores))
        - unit * (3 * runs(c) + float(c.sum(1).float().mean()))
        for c in (chunks, alone)
    ]
    assert worth[0] > worth[1]


def test_ends_of_the_share(backend: Backend) -> None:
    scores = energies().log()
    for text in ("importance", "chunks:5"):
        found = fitted(scores, 1.0, parse(text), False, backend)
        assert found.threshold == ALL
        assert bool(found.chosen(scores - 1e6, backend).all())
    exact = fitted(scores, 0.5, parse("chunks:5"), True, backend)
    assert exact == Rule(0.0, 5.0, True)
    assert runs(torch.tensor([[True, True, False, True], [False] * 4])) == 1.0


@pytest.mark.parametrize(
    "text", ["chunk", "importance:2", "chunks:", "chunks:x", "chunks:-1", "chunks:nan"]
)
def test_bad_choices(text: str) -> None:
    with pytest.raises(OptionError, match="choose is"):
        parse(text)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from([1, 2, 16, 36]), st.integers(0, 99))
def test_gathered_by_c_as_by_torch(count: int, pieces: int, size: int, seed: int) -> None:
    """And nothing else is written to."""
    if (native := native_in(home_folder() / "native")) is None:
        pytest.skip("no C compiler on this machine")
    generator = torch.Generator().manual_seed(seed)
    records = torch.randint(0, 256, (7, 200), generator=generator).to(torch.uint8)
    places, at = (torch.randperm(7, generator=generator)[:count] for _ in range(2))
    field = Pieces(
        int(torch.randint(0, 200 - pieces * size, (), generator=generator)), pieces, size
    )
    found, twin = (torch.zeros(pieces, 7 * size, dtype=torch.uint8) for _ in range(2))
    native.gather(records, places, field, found, at)
    PLAIN.gather(records, places, field, twin, at)
    assert torch.equal(found, twin)
    for place, to in zip(places.tolist(), at.tolist(), strict=True):
        for p in range(pieces):
            first = field.offset + p * size
            made = found[p, to * size : (to + 1) * size]
            assert torch.equal(made, records[place, first : first + size])
    assert int((found != 0).sum()) <= count * pieces * size
