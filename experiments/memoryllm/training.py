"""How fast arms train: `python -m experiments.memoryllm.training -o ROWS.jsonl [--config tiny] [--steps 6]
[--threads 1 2]`.

Tokens/s of training steps (random tokens; the first step is not counted), and their share of what the
processor gives: operations a token are six for each parameter in a product, and those of attention's scores
and sums (6 * length * width a layer, the masked half left out, backward with forward); the ceiling is the
fastest product of square matrices in 16 or 32 bits, measured before and after.
"""

from __future__ import annotations

import statistics
import time

import torch

from experiments.memoryllm.arms import recipe_of
from experiments.runs import Row, arguments, record
from outsize.adapt import loop
from outsize.adapt.memory.task import MemoryRecipe, MemoryTask
from outsize.adapt.trainable import matmul_type
from outsize.plan import probe


def operations(recipe: MemoryRecipe) -> int:
    """Of a token, forward and backward."""
    s = recipe.shape()
    return 6 * (s.non_embedding + s.vocab * s.width + s.layers * recipe.length * s.width)


def ceiling() -> float:
    """Operations/s of large products."""
    return max(map(probe.matmul_speed, (torch.bfloat16, torch.float32)))


def speed(recipe: MemoryRecipe) -> Row:
    device = torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    size = recipe.shape().vocab
    ids = torch.randint(0, size, (1 << 16,), generator=generator, device=device)
    training = loop.start(MemoryTask(recipe, ids, ids, device, matmul_type(device)), "")
    seconds, before = list[float](), ceiling()
    while training.step < recipe.steps:
        begin = time.perf_counter()
        training.run_step()
        seconds.append(time.perf_counter() - begin)
    most = max(before, ceiling())
    rate = recipe.batch * recipe.length / statistics.median(seconds[1:])
    return {
        "tokens_per_s": round(rate, 1), "operations": operations(recipe), "ceiling": round(most),
        "share": round(rate * operations(recipe) / most, 4),
        "seconds": [round(s, 4) for s in seconds],
    }  # fmt: skip


def main() -> None:
    told = arguments(
        __doc__, config="tiny", steps=6, batch=8, arms=["base", "memory", "flex3"], threads=[1, 2]
    )
    for threads in told.threads:
        torch.set_num_threads(threads)
        for arm in told.arms:
            recipe = recipe_of(arm, told.config, 0, steps=told.steps, batch=told.batch)
            row: Row = {"config": told.config, "arm": arm, "threads": threads, "batch": told.batch}
            record(row | speed(recipe), told.output)


if __name__ == "__main__":
    main()
