"""Trained arms of MemoryLLM: `python -m experiments.memoryllm.arms FOLDER TEXT... -o ROWS.jsonl [--arms ...]
[--seeds 0 1 2] [--config mini] [--steps 600]`.

All arms are given the same tokens in the same order, one thread, and are evaluated at the same steps on the
same held-out tokens (nats a token). One row an arm and seed, appended as soon as it is done; the model lies
in FOLDER/ARM-SEED as a checkpoint. Broken off and called again, it goes on with what is missing. Rates are by
processor time, since other work runs beside.

    base      llama: the feed-forward reads the residual stream
    memory    it reads the token's embedding, through a norm of each layer's own
    shared    the same, one norm for all layers
    flex1..3  so many width^2 numbers of it read the residual stream
    fewer     llama with a feed-forward of 32 numbers: somewhat more than memory computes beside its table
    fewer3    llama with as many numbers as flex3 computes beside its table
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from experiments.runs import Row, arguments, record, recorded
from outsize.adapt import loop
from outsize.adapt.memory.task import CONFIGS, MemoryRecipe, MemoryTask
from outsize.adapt.memory.text import Text, encoded, new_tokenizer
from outsize.adapt.memory.train import write
from outsize.adapt.trainable import matmul_type

ARMS: dict[str, dict[str, Any]] = {
    "base": {"base": True},
    "memory": {},
    "fewer": {"base": True, "inner": 32},
    "flex3": {"flex": 3},
    "flex1": {"flex": 1},
    "flex2": {"flex": 2},
    "shared": {"shared_norm": True},
    "fewer3": {"base": True},  # its inner width is flex3's dense one
}
MARKS = 4  # evaluations


def recipe_of(arm: str, config: str, seed: int, **more: Any) -> MemoryRecipe:
    """How an arm is trained."""
    told = ARMS[arm] | more
    if arm == "fewer3":
        told["inner"] = MemoryRecipe(config=config, flex=3).shape().dense
    return MemoryRecipe(config=config, seed=seed, **told)


def task_of(recipe: MemoryRecipe, text: Text) -> MemoryTask:
    device = torch.device("cpu")
    return MemoryTask(recipe, text.train.long(), text.held_out.long(), device, matmul_type(device))


def run(name: str, recipe: MemoryRecipe, text: Text, folder: Path) -> Row:
    """Train one arm, from where it was broken off."""
    task, shape = task_of(recipe, text), recipe.shape()
    checkpoint, marks = folder / "training.checkpoint", folder / "marks.json"
    folder.mkdir(parents=True, exist_ok=True)
    goes_on = checkpoint.is_file() and marks.is_file()
    training = loop.resume(task, checkpoint, "") if goes_on else loop.start(task, "")
    curve: list[list[float]] = json.loads(marks.read_text()) if goes_on else []
    every, spent = recipe.steps // MARKS, curve[-1][2] if curve else 0.0
    begin = time.process_time() - spent

    def mark(now: loop.Training) -> None:
        if now.step % every == 0:
            tokens = now.step * recipe.batch * recipe.length
            curve.append([tokens, now.figures["held_out_loss"], time.process_time() - begin])
            marks.write_text(json.dumps(curve))
            print(name, recipe.seed, curve[-1], flush=True)

    loop.train(training, checkpoint, every, mark)
    (folder / "tokenizer.json").write_text(text.tokenizer)
    write(folder, task)
    checkpoint.unlink()
    tokens, cpu_s = recipe.steps * recipe.batch * recipe.length, curve[-1][2]
    return {
        "arm": name, "seed": recipe.seed, "config": recipe.config, "steps": recipe.steps, "tokens": tokens,
        "loss": curve[-1][1], "curve": [one[:2] for one in curve], "non_embedding": shape.non_embedding,
        "active": shape.active, "inner": shape.inner, "dense": shape.dense, "cpu_s": round(cpu_s, 1),
        "tokens_per_cpu_s": round(tokens / cpu_s, 1),
        "flop_per_token": 6 * (shape.non_embedding + shape.vocab * shape.width),
        "train_tokens": len(text.train), "held_out_tokens": len(text.held_out),
    }  # fmt: skip


def text_of(folder: Path, texts: list[Path], config: str) -> Text:
    """The texts as tokens of a tokenizer that is trained on them once."""
    kept = folder / "tokenizer.json"
    if not kept.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(new_tokenizer(texts, CONFIGS[config][3]))
    return encoded(texts, kept.read_text(), MemoryRecipe().length)


def missing(arms: list[str], seeds: list[int], output: Path) -> Iterator[tuple[str, int]]:
    """What has no row, seed by seed."""
    done = {(row["arm"], row["seed"]) for row in recorded(output)}
    for seed in seeds:
        yield from ((arm, seed) for arm in arms if (arm, seed) not in done)


def main() -> None:
    told = arguments(
        __doc__, "folder", "texts+", arms=list(ARMS), seeds=[0], steps=600, batch=8, config="mini"
    )
    torch.set_num_threads(1)
    folder, texts = Path(told.folder), [Path(text) for text in told.texts]
    text = text_of(folder, texts, told.config)
    for name, seed in missing(told.arms, told.seeds, told.output):
        recipe = recipe_of(name, told.config, seed, steps=told.steps, batch=told.batch)
        record(run(name, recipe, text, folder / f"{name}-{seed}"), told.output)


if __name__ == "__main__":
    main()
