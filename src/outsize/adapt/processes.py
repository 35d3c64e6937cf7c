"""Several processes that train together, as torchrun starts them: each takes every `world`-th of what
there is to do. Only tensors are exchanged (data parallelism).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from outsize.errors import OptionError


def processes() -> tuple[int, int]:
    """(rank, how many) as torchrun says."""
    ready = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if ready else (0, 1)


def to_come() -> tuple[int, int]:
    """How many processes torchrun starts: on this machine, and in all; also before they have met."""
    local, world = (int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    return max(1, local), max(1, world)


def is_first() -> bool:
    """Is this the process that speaks and writes? Also before they have met, and after they have left."""
    return os.environ.get("RANK", "0") == "0"


def average(grads: Sequence[Tensor]) -> None:
    """Over all processes, as one message."""
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def meet() -> None:
    """Wait until all processes are here."""
    if processes()[1] > 1:
        dist.barrier()


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


def join(device: str) -> torch.device:
    """The device to train on; joins the other processes if torchrun started several. Raises OptionError."""
    if device not in ("auto", "cpu", "cuda"):
        raise OptionError(f"device is {device!r}; auto, cpu or cuda is expected")
    if device == "cuda" and not torch.cuda.is_available():
        raise OptionError("device is cuda, but torch sees none here; use --device cpu")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if kind == "cuda" else kind)


def leave() -> None:
    """End what `torch.distributed.init_process_group` began, if it did."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
