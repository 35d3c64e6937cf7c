"""Attention of long spans in C against its twin in torch; and that a row's bits are its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from outsize.kernels.attention import attend_span
from outsize.kernels.backend import AttentionSpec
from outsize.kernels.find import native_in
from outsize.kernels.spans import Spans

SHAPES = [(9, 3, 64), (4, 4, 32), (14, 2, 64), (8, 1, 96), (4, 2, 128), (2, 1, 256), (3, 1, 576)]
KINDS = {
    "all": {}, "window": {"window": 100}, "pieces": {"window": 128, "chunked": True}, "capped": {"cap": 5.0},
}  # fmt: skip


@pytest.fixture
def spans(home: Path) -> Spans:
    native = native_in(home / "native")
    if native is None or not native.library.bf16_products():
        pytest.skip("the processor has no products of bf16, or there is no compiler")
    return Spans(native.library, tiles=False)


def made(shape: tuple[int, int, int], rows: int, stored: int) -> tuple[Tensor, Tensor]:
    """Queries, and a cache whose room past what is stored holds no numbers."""
    heads, kv_heads, head_dim = shape
    torch.manual_seed(rows + stored)
    q = torch.randn(rows, heads, head_dim, dtype=torch.bfloat16, device="cpu")
    kv = torch.randn(2 * kv_heads, stored + 7, head_dim, dtype=torch.bfloat16, device="cpu")
    kv[:, stored:] = torch.nan
    return q, kv[:, :stored]


def spec(shape: tuple[int, int, int], kind: str, sinks: bool = False) -> AttentionSpec:
    heads, kv_heads, head_dim = shape
    some = torch.linspace(-1, 2, heads, dtype=torch.float32, device="cpu") if sinks else None
    return AttentionSpec(0, heads, kv_heads, head_dim, head_dim**-0.5, sinks=some, **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_spans_equal_torch(spans: Spans, shape: tuple[int, int, int], kind: str) -> None:
    for rows, stored, sinks in ((70, 70, False), (150, 700, True), (17, 257, False)):
        q, kv = made(shape, rows, stored)
        keys = list(range(0, 2 * stored, 2))  # as after pruning: not every position is stored
        how = spec(shape, kind, sinks)
        ours = spans.attend(q, keys[-rows:], kv, keys, how)
        right = attend_span(q.float(), keys[-rows:], kv.float(), keys, how)
        assert not torch.equal(ours.float(), right), "torch was asked, not C"
        torch.testing.assert_close(ours.float(), right, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_a_rows_bits_are_its_own(spans: Spans, shape: tuple[int, int, int], kind: str) -> None:
    q, kv = made(shape, 200, 600)
    keys, how = list(range(600)), spec(shape, kind)
    whole = spans.attend(q, keys[400:], kv, keys, how)
    for size in (1, 64, 130):
        parts = [
            spans.attend(
                q[at : at + size], keys[400 + at : 400 + at + size], kv[:, :end], keys[:end], how
            )
            for at in range(0, 200, size)
            for end in [min(400 + at + size, 600)]
        ]
        assert torch.equal(torch.cat(parts), whole), size


def test_other_heads_and_types_go_to_torch(spans: Spans) -> None:
    for shape, dtype in (((4, 2, 48), torch.bfloat16), ((4, 2, 64), torch.float32)):
        q, kv = (t.to(dtype) for t in made(shape, 40, 40))
        keys, how = list(range(40)), spec(shape, "all")
        assert torch.equal(
            spans.attend(q, keys, kv, keys, how), attend_span(q, keys, kv, keys, how)
        )
