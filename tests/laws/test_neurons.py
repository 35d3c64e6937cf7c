"""The law of paged neurons: all of them chosen, the logits are the dense model's; whatever is chosen, they depend on
the row alone: not on what stays in memory, nor on its policy, on threads, or on other rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from outsize import registry
from outsize.caching import eviction
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.home import home as home_folder
from outsize.kernels.backend import Backend
from outsize.kernels.find import native_in
from outsize.kernels.plain import PLAIN
from outsize.model.transformer import Transformer
from outsize.pack import fetch
from outsize.pack.format import Pack
from outsize.progress import silent
from outsize.weights import load as weights
from outsize.weights.bundles import make
from outsize.weights.open_pack import LoadPlan
from outsize.weights.residency import Share, all_of
from outsize.weights.spec import PROFILED, REPLAYED
from tests.golden import tiny

LIVE = [n for n in registry.names(eviction) if n not in (*REPLAYED, PROFILED)]
SPANS = [[0, 30], [30, 31], [31, 32], [32, 36], [36, 37], [37, 38]]


class Fixed:
    """Chooses by the row's own numbers: about half of the bundles, or all, or none."""

    def __init__(self, count: int, how: str) -> None:
        self._count, self._how = count, how

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        score = torch.stack([x.float()[: self._count] for x in x_TD])
        floor = {"all": -torch.inf, "some": 0.0, "none": torch.inf}[self._how]
        return score > floor, score


@contextmanager
def opened(
    pack: Pack,
    how: str | None,
    slots: int | None = None,
    policy: str = "lru",
    backend: Backend = PLAIN,
) -> Iterator[Transformer]:
    """With so many slots for bundles; `how` None: dense."""
    bundles = make(pack, None, silent)
    shares = {t.name: all_of(t) for t in pack.tables}
    if slots is not None:
        shares |= {t.bundles.name: Share((), slots) for t in bundles.tables}
    plan = LoadPlan(shares, neurons=None if how is None else (bundles, policy))
    loaded = weights.load(pack, backend, plan)
    try:
        model = Transformer(pack.description, loaded, backend)
        if how is not None:
            model.page_neurons([Fixed(bundles.count, how)] * pack.description.num_layers)
        yield model
    finally:
        loaded.close()


def logits(model: Transformer, spans: Sequence[Sequence[int]] = SPANS) -> Tensor:
    kv, rows = model.new_kv(), []
    for first, last in spans:
        (out,) = full(model, [Span(first, tiny.TOKENS[first:last], last - first)], [kv])
        rows.append(out.logits_KV)
    return torch.cat(rows)


def packed(folder_of: Callable[[str], Path], family: str, encoding: str) -> Pack:
    return fetch.pack(str(folder_of(family)), encoding=encoding, quiet=True)


@pytest.mark.parametrize("family", ["llama", "llama+biases", "qwen2", "gemma3"])
@pytest.mark.parametrize("encoding", ["fp32", "bf16", "int8", "q4_0", "q4_1", "q5_0", "q8_0"])
def test_all_chosen_is_dense(
    folder_of: Callable[[str], Path], home: Path, family: str, encoding: str
) -> None:
    backend = native_in(home_folder() / "native") or PLAIN
    pack = packed(folder_of, family, encoding)
    with opened(pack, None, backend=backend) as model:
        expected = logits(model)
    with opened(pack, "all", 2, backend=backend) as model:
        assert torch.equal(logits(model), expected)
        assert model.loaded.expert_stats.misses > 0
    with opened(pack, "some", backend=backend) as model:
        assert not torch.equal(logits(model), expected)
