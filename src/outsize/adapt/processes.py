"""Several processes that train together, as torchrun starts them: each takes every `world`-th of what
there is to do. Only tensors are exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def processes() -> tuple[int, int]:
    """(rank, how many) as torchrun says."""
    ready = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if ready else (0, 1)


def average(grads: Sequence[Tensor]) -> None:
    """Over all processes, as one message."""
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def shared(
    mine: Sequence[Sequence[int]], count: int, longest: int, device: torch.device
) -> list[list[int]]:
    """All `count` lists of tokens, of which this process made every `world`-th."""
    rank, world = processes()
    if world == 1:
        return [list(row) for row in mine]
    rows = torch.full((count, longest), -1, device=device)
    for row, made in zip(rows[rank::world], mine, strict=True):
        row[: len(made)] = torch.tensor(made)
    dist.all_reduce(rows, dist.ReduceOp.MAX)
    return [row[row >= 0].tolist() for row in rows]


def leave() -> None:
    """End what `torch.distributed.init_process_group` began, if it did."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
