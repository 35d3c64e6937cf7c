"""What is learnt block by block of a model that ranks will share: orders of key heads, and corrections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, bfloat16

from outsize.adapt.sync.blocks import Block, blocks
from outsize.adapt.sync.distill import Distilled
from outsize.adapt.sync.heads import Grouping
from outsize.adapt.trainable import TrainableModel, matmul_type
from outsize.model_parts import Shard
from outsize.pack.format import Pack
from outsize.parallel.dropped import Correction
from outsize.parallel.split import key_unit
from outsize.progress import Progress

CPU = torch.device("cpu")
ENOUGH = 8192  # tokens of which all layers' streams are held: a model's width of numbers each


def grouped(
    pack: Pack, shards: Sequence[Shard], ids_BT: Tensor, draw: Progress
) -> tuple[tuple[int, ...], ...]:
    """An order of key heads for each layer. Raises UnsupportedError."""
    orders, unit = list[tuple[int, ...]](), key_unit(pack.description, pack.tables)
    for block in _blocks(pack, ids_BT, draw, "group heads"):
        found = Grouping(block, _neurons(shards), _ends(shards), unit)
        orders.append(found.best()[0])
    return tuple(orders)


def distilled(
    pack: Pack,
    shards: Sequence[Shard],
    ids_BT: Tensor,
    begun: Mapping[int, Sequence[Correction]],
    how: tuple[int, Progress],
) -> dict[int, list[Correction]]:
    """Corrections of all ranks, of the layers that have some, after so many steps each; as they are stored.
    `how`: steps, and who is told. Raises UnsupportedError."""
    (steps, draw), made = how, dict[int, list[Correction]]()
    for block in _blocks(pack, ids_BT, draw, "distill"):
        if block.layer not in begun:
            continue
        heads = shards[0].order(block.layer), _ends(shards)
        found = Distilled(block, _neurons(shards), heads).learn(
            begun[block.layer], steps, block.layer
        )
        made[block.layer] = [stored(c) for c in found]
    return made


def stored(c: Correction) -> Correction:
    """As a file keeps it."""
    return Correction(c.first.to(bfloat16).float(), c.second.to(bfloat16).float())


def _blocks(pack: Pack, ids_BT: Tensor, draw: Progress, what: str) -> Iterator[Block]:
    model = TrainableModel(pack, CPU, matmul_type(CPU), draw)
    some = ids_BT[: max(1, ENOUGH // ids_BT.shape[1])]
    for block in blocks(model, some):
        draw(what, block.layer, model.description.num_layers)
        yield block


def _neurons(shards: Sequence[Shard]) -> list[tuple[int, int]]:
    return [s.neurons for s in shards]


def _ends(shards: Sequence[Shard]) -> list[int]:
    return [s.kv_heads[1] for s in shards]
