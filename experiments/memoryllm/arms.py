"""Trained arms of MemoryLLM: `python -m experiments.memoryllm.arms FOLDER TEXT... -o ROWS.jsonl [--arms ...]
[--seeds 0 1 2] [--steps 240]`.

All arms are given the same tokens in the same order, one thread, and are evaluated at the same steps on the
same held-out tokens (nats a token). One row an arm and seed, appended as soon as it is done; the model lies
in FOLDER/ARM-SEED as a checkpoint. Rates are by processor time, since other work runs beside.

    base      llama: the feed-forward reads the residual stream
    memory    it reads the token's embedding, through a norm of each layer's own
    shared    the same, one norm for all layers
    flex1..3  so many width^2 numbers of it read the residual stream
    fewer     llama with a feed-forward of 32 numbers, about as large as what memory computes beside its table
    fewer3    llama with as many numbers as flex3 computes beside its table
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from experiments.runs import Row, arguments
from outsize.adapt import loop
from outsize.adapt.memory.task import CONFIGS, MemoryRecipe, MemoryTask
from outsize.adapt.memory.text import Text, encoded, new_tokenizer
from outsize.adapt.memory.train import write
from outsize.adapt.trainable import matmul_type

ARMS: dict[str, dict[str, Any]] = {
    "base": {"base": True},
    "memory": {},
    "flex3": {"flex": 3},
    "fewer": {"base": True, "inner": 32},
    "flex1": {"flex": 1},
    "flex2": {"flex": 2},
    "fewer3": {"base": True, "inner": 256},
    "shared": {"shared_norm": True},
}
MARKS = 4  # evaluations


def run(name: str, recipe: MemoryRecipe, text: Text, folder: Path) -> Row:
    device = torch.device("cpu")
    task = MemoryTask(recipe, text.train.long(), text.held_out.long(), device, matmul_type(device))
    training, curve = loop.start(task, ""), []
    begin, wall = time.process_time(), time.monotonic()
    while training.step < recipe.steps:
        training.run_step()
        if training.step * MARKS % recipe.steps == 0:
            loss = task.evaluate()["held_out_loss"]
            curve.append([training.step * recipe.batch * recipe.length, loss])
            print(name, recipe.seed, curve[-1], flush=True)
    cpu_s, shape = time.process_time() - begin, recipe.shape()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(text.tokenizer)
    write(folder, task)
    tokens = recipe.steps * recipe.batch * recipe.length
    return {
        "arm": name, "seed": recipe.seed, "steps": recipe.steps, "tokens": tokens,
        "loss": curve[-1][1], "curve": curve, "non_embedding": shape.non_embedding,
        "active": shape.active, "inner": shape.inner, "dense": shape.dense,
        "cpu_s": round(cpu_s, 1), "wall_s": round(time.monotonic() - wall, 1),
        "tokens_per_cpu_s": round(tokens / cpu_s, 1),
        "flop_per_token": 6 * (shape.non_embedding + shape.vocab * shape.width),
        "train_tokens": len(text.train), "held_out_tokens": len(text.held_out),
    }  # fmt: skip


def main() -> None:
    told = arguments(__doc__, "folder", "texts+", arms=list(ARMS), seeds=[0], steps=240, batch=8)
    torch.set_num_threads(1)
    folder, texts = Path(told.folder), [Path(text) for text in told.texts]
    kept = folder / "tokenizer.json"
    if not kept.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(new_tokenizer(texts, CONFIGS["tiny"][3]))
    text = encoded(texts, kept.read_text(), MemoryRecipe().length)
    for seed in told.seeds:
        for name in told.arms:
            more: dict[str, Any] = ARMS[name]
            recipe = MemoryRecipe(steps=told.steps, batch=told.batch, seed=seed, **more)
            with told.output.open("a") as file:
                file.write(json.dumps(run(name, recipe, text, folder / f"{name}-{seed}")) + "\n")


if __name__ == "__main__":
    main()
