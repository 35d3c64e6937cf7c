"""The laws of lazy prefill: where nothing is pruned it is the full pass; what it prunes and revives is what a
slow, plain reference does; each token runs through a layer at most once; company and drafts change nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from outsize.engine.model import Model
from outsize.forward.full import full
from outsize.forward.lazy import lazy
from outsize.forward.prune import Prune
from outsize.forward.span import Span
from outsize.kv.kv import KV
from tests.golden import tiny
from tests.lazy_reference import Reference

PROMPT, NEXT = tiny.TOKENS, [(31 * j + 5) % tiny.VOCAB for j in range(8)]
HALF = Prune(keep=(0.6, 0.3), after=(0.3, 0.67))
SETTINGS = {
    "revive": Prune((0.6, 0.3), (0.3, 0.67), "revive"),
    "once": HALF,
    "drop": Prune((0.6, 0.3), (0.3, 0.67), "drop"),
    "window": Prune((0.5, 0.25), (0.3, 0.67), "revive", window=4),
    "layers": Prune((0.3,), (0.67,), "revive", layers=2),
    "mass": Prune(after=(0.3, 0.67), mode="revive", mass=0.7),
}


def away(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def check_depths(kv: KV, num_layers: int, length: int) -> None:
    """A layer has entries of the tokens that have been through it, and no others."""
    depth = dict.fromkeys(range(length), num_layers)
    for pruned in kv.pruned:
        depth |= dict(zip(pruned.tokens.tolist(), pruned.depth.tolist(), strict=True))
    for layer, kept in enumerate(kv.positions):
        assert list(kept) == [p for p in range(length) if depth[p] > layer]


@pytest.mark.parametrize("family", tiny.CONFIGS)
@pytest.mark.parametrize("how", SETTINGS)
def test_pruning_and_reviving_equal_the_plain_way(
    how: str, family: str, open_tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    t, prune = open_tiny(family, "fp32").transformer, SETTINGS[how]
    reference, kv, placed = Reference(t, prune), t.new_kv(), set[tuple[int, int]]()
    place = KV.place

    def counting(self: KV, layer: int, positions: list[int], beyond: int = 0) -> object:
        new = {(layer, p) for p in positions}
        assert not new & placed, "computed before"
        placed.update(new)
        return place(self, layer, positions, beyond)

    monkeypatch.setattr(KV, "place", counting)
    (out,) = lazy(t, [Span(0, PROMPT, prune=prune)], [kv])
    assert away(out.logits_KV[0], reference.step(PROMPT, True)) < 1e-5
    first = len(placed)
    assert first < t.description.num_layers * len(PROMPT)
    for j, token in enumerate(NEXT):
        (out,) = lazy(t, [Span(len(PROMPT) + j, [token], prune=prune)], [kv])
        assert away(out.logits_KV[0], reference.step([token], False)) < 1e-5
        if how != "drop":
            check_depths(kv, t.description.num_layers, len(PROMPT) + j + 1)
    assert len(placed) == reference.computed
    revived = len(placed) - first - t.description.num_layers * len(NEXT)
    if family != "mistral":  # whose layers see 8 tokens, which all went on
        assert (revived > 0) == (prune.mode == "revive")


@pytest.mark.parametrize("family", tiny.CONFIGS)
@pytest.mark.parametrize("encoding", ["int8", "fp32"])
def test_where_nothing_is_pruned_it_is_the_full_pass(
    family: str, encoding: str, open_tiny: Callable[..., Model]
) -> None:
    t = open_tiny(family, encoding).transformer
    for keep in (1.0, 0.999):  # of so few tokens, all go on; the second looks at attention
        prune, kvs = Prune((keep,) * 2, (0.3, 0.67), "revive"), (t.new_kv(), t.new_kv())
        for start, tokens in ((0, PROMPT), (40, NEXT[:1]), (41, NEXT[1:4]), (44, PROMPT[:30])):
            (ours,) = lazy(t, [Span(start, tokens, prune=prune)], kvs[:1])
            (theirs,) = full(t, [Span(start, tokens)], kvs[1:])
            assert torch.equal(ours.logits_KV, theirs.logits_KV)
        for layer in range(t.description.num_layers):
            assert torch.equal(kvs[0].view(layer), kvs[1].view(layer))
