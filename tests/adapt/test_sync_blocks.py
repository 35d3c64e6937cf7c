"""Block-to-block distillation and head grouping: what a block is, that orders change nothing but what is
dropped, that both help, and a file with both that two processes run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import outsize
from outsize.adapt.sync.blocks import Block, blocks, parts
from outsize.adapt.sync.choose import DISTILLED, Rises
from outsize.adapt.sync.distill import Distilled
from outsize.adapt.sync.heads import Grouping
from outsize.adapt.sync.run import SyncOptions, run
from outsize.adapt.trainable import TrainableModel
from outsize.engine.model import Model
from outsize.errors import OptionError, UnsupportedError
from outsize.forward.full import hidden
from outsize.forward.span import Span
from outsize.home import home
from outsize.model.lora import Sliced
from outsize.model_parts import orders_fit
from outsize.pack import sync_file
from outsize.parallel.dropped import Drop, Fit
from outsize.parallel.points import Points
from outsize.parallel.shard import cut
from outsize.parallel.split import Ranks, Way, split
from outsize.progress import silent
from tests.golden import tiny
from tests.parallel.sharded import opened

CPU = torch.device("cpu")
IDS = torch.tensor((tiny.TOKENS * 16)[:512]).view(4, 128)


@pytest.fixture
def found(open_tiny: Callable[..., Model]) -> tuple[Model, list[Block]]:
    model = open_tiny("qwen2+wide", "q4_0")
    network = TrainableModel(model.pack, CPU, torch.float32, silent)
    return model, list(blocks(network, IDS))


def neurons(model: Model) -> list[tuple[int, int]]:
    half = model.pack.description.ffn_width // 2
    return [(0, half), (half, 2 * half)]


def test_a_block_is_the_model_s(found: tuple[Model, list[Block]]) -> None:
    """Attention by head, added up, and the feed-forward by neurons are what the next block reads."""
    model, (first, second, *_) = found
    attention = torch.stack(first.by_key()).sum(0) + first.bias_D
    h = first.x_TD + attention
    both = sum(first.ffn(h, some) for some in neurons(model))
    bias = first.weights.get("down_bias", 0.0)
    assert torch.allclose(h + both + bias, second.x_TD, atol=1e-4, rtol=1e-4)


def test_parts_follow_the_order(found: tuple[Model, list[Block]]) -> None:
    by_key = found[1][0].by_key()
    natural, turned = parts(by_key, (0, 1), (1, 2)), parts(by_key, (1, 0), (1, 2))
    assert torch.equal(natural[0], turned[1])
    assert torch.equal(natural[1], turned[0])


def test_learning_helps_and_never_hurts(found: tuple[Model, list[Block]]) -> None:
    model, (_, block, *_) = found
    with torch.no_grad():
        held, whole = parts(block.by_key(), (0, 1), (1, 2)), torch.stack(block.by_key()).sum(0)
        fits = [Fit(block.x_TD.shape[1]) for _ in held]
        for fit, part in zip(fits, held, strict=True):
            fit.add(block.normed_TD, part, whole - part)
    begun = [fit.solve(8) for fit in fits]
    it = Distilled(block, neurons(model), ((0, 1), (1, 2)))
    assert it.learn(begun, 0) == begun
    learnt = it.learn(begun, 40)
    assert it.error(learnt) < 0.95 * it.error(begun)
    assert it.error(begun) < it.error([None, None])


def test_the_best_order_is_found(found: tuple[Model, list[Block]]) -> None:
    """Of two key heads there are two orders; of a block whose second rank's neurons do nothing, the better is
    that which gives the first rank the head that matters."""
    model, (block, *_) = found
    given = neurons(model)
    grouping = Grouping(block, given, (1, 2))
    orders = {order: grouping.error(order) for order in ((0, 1), (1, 0))}
    best, least, first = grouping.best()
    assert first == orders[0, 1]
    assert least == orders[best]
    assert least <= first
    d = block.description
    each = d.num_heads // d.num_kv_heads * d.head_dim
    block.weights = {**block.weights, "o": block.weights["o"].clone()}
    block.weights["o"][:, :each] = 0.0  # head 0 gives nothing
    start = given[1][0]
    block.weights["down"] = block.weights["down"].clone()
    block.weights["down"][:, start:] = 0.0
    assert Grouping(block, given, (1, 2)).best()[0] == (1, 0)


def test_an_order_changes_only_what_is_dropped(open_tiny: Callable[..., Model]) -> None:
    """Each layer with an order of its own, one key head a rank: while all sums are taken, the same bits,
    since two parts are added alike in either order; with one left out, other ones."""
    model = open_tiny("qwen2+wide", "q4_0")
    d, pack = model.pack.description, model.pack
    orders = tuple((1, 0) if layer % 2 else (0, 1) for layer in range(d.num_layers))
    ids = tiny.TOKENS[:40]

    def streams(way: Way, dropped: tuple[int, ...]) -> torch.Tensor:
        shards = split("x", d, pack.tables, Ranks((1.0, 1.0)), way)
        packs = [cut(pack, shard, home()) for shard in shards]
        assert packs[0].description.shard == shards[0]

        def run_(rank: Any) -> torch.Tensor:
            kv = rank.model.new_kv(64)
            (a,) = hidden(rank.model, [(Span(0, ids), kv)])
            (b,) = hidden(rank.model, [(Span(len(ids), ids[:1]), kv)])
            return torch.cat([a, b])

        with opened(packs, points=lambda _: Points(Drop(frozenset(dropped)))) as on_all:
            one, other = on_all(run_)
        assert torch.equal(one, other)
        return one

    natural, turned = Way("sum", "heads"), Way("sum", "heads", key_orders=orders)
    assert torch.equal(streams(natural, ()), streams(turned, ()))
    assert torch.equal(streams(natural, (0,)), streams(turned, (0,))), (
        "layer 0 has the model's order"
    )
    assert not torch.equal(streams(natural, (1,)), streams(turned, (1,)))
    assert not orders_fit(((0, 0),) * d.num_layers, d.num_layers, d.num_kv_heads)
    for bad in (orders[:-1], ((0, 0),) * d.num_layers):
        with pytest.raises(UnsupportedError, match="orders of key heads are for"):
            split("x", d, pack.tables, Ranks((1.0, 1.0)), Way("sum", "heads", key_orders=bad))


def test_a_file_with_both_and_a_run_with_it(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text, out = tmp_path / "text.txt", tmp_path / "m.sync.safetensors"
    text.write_text("\n".join(f"abc {i} cab{i % 7} bca" * 6 for i in range(60)))
    name = str(folder_of("qwen2+wide"))
    options: dict[str, Any] = {"tokens": 1500, "length": 64, "sweep": 2, "quiet": True}
    options |= {"rank": 8, "distill": 10, "group": True, "gate": 1e-3, "allow": True}
    made = run(SyncOptions(name, (text,), out, **options))
    assert any("distilled" in line for line in made.table[:1])
    about = made.about
    assert len(about.key_orders) == tiny.LAYERS
    assert sync_file.read(out, tiny.LAYERS, tiny.WIDTH).about == about
    how: dict[str, Any] = {"ranks": 2, "memory": "1GB", "quiet": True}
    with outsize.load(name, parallel=f"tensor:sync={out}", **how) as model:
        assert len(model.generate("abc " * 20, max_tokens=8, raw=True)[0].text) > 0
    with pytest.raises(OptionError, match="--rank 0 has none"):
        SyncOptions(name, (text,), distill=5, rank=0)
    assert Rises([0.3], [0.2], {}, [0.1]).best(0) == (DISTILLED, 0.1)


def test_an_adapter_s_part_follows_the_order(open_tiny: Callable[..., Model]) -> None:
    """Of B the rows of a rank's heads, of A their columns, in each layer's own order."""
    model = open_tiny("qwen2+wide", "q4_0")
    d = model.pack.description
    orders = tuple((1, 0) if layer % 2 else (0, 1) for layer in range(d.num_layers))
    way = Way("sum", "heads", key_orders=orders)
    shard = split("x", d, model.pack.tables, Ranks((1.0, 1.0)), way)[0]
    heads, keys = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
    rows = {"q": heads, "k": keys, "o": d.width}
    b = {n: torch.arange(r, dtype=torch.float32)[:, None] for n, r in rows.items()}
    a = torch.arange(heads, dtype=torch.float32)[None]
    factors = {f"{i}.{n}": (a, b[n]) for i in (0, 1) for n in rows}
    sliced = Sliced(factors, shard, d.head_dim)
    assert torch.equal(sliced["0.q"][1], b["q"][: heads // 2])
    assert torch.equal(sliced["1.q"][1], b["q"][heads // 2 :])
    assert torch.equal(sliced["0.k"][1], b["k"][: keys // 2])
    assert torch.equal(sliced["1.k"][1], b["k"][keys // 2 :])
    assert torch.equal(sliced["1.o"][0], a[:, heads // 2 :])
    assert torch.equal(sliced["1.o"][1], b["o"])
