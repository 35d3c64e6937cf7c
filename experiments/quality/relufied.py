"""A model with ReLU in place of SwiGLU, trained from itself, and how few of its neurons fire then.

    python -m experiments.quality.relufied --model PACK --text FILE... --folder WORK --bundle 32 --penalty 1

One row: recipe, figures at the end, and as training went on. WORK keeps the pack: each recipe has a home of
its own there, since a training's checkpoint is named by its model."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch

from experiments.runs import arguments, record
from outsize.adapt.relu.run import ReluOptions, about, run
from outsize.adapt.relu.task import ReluRecipe
from outsize.home import home
from outsize.pack import fetch


def place(folder: Path, recipe: ReluRecipe) -> None:
    """From here on, a home with the packs of this one."""
    name = f"bundle{recipe.bundle}-penalty{recipe.penalty:g}-seed{recipe.seed}"
    (folder / name).mkdir(parents=True, exist_ok=True)
    if not (folder / name / "packs").exists():
        (folder / name / "packs").symlink_to((home() / "packs").resolve())
    os.environ["OUTSIZE_HOME"] = str(folder / name)


def main() -> None:
    args = arguments(
        __doc__, model=str, text=[""], folder=Path, device="auto", tokens=1 << 22, every=200, steps=2000,
        batch=16, length=256, rate=3e-4, match=1.0, penalty=0.1, bundle=1, seed=0, resume=False,
    )  # fmt: skip
    names = "steps", "batch", "length", "rate", "match", "penalty", "bundle", "seed"
    recipe = ReluRecipe(**{name: getattr(args, name) for name in names})
    base = fetch.find(args.model) or fetch.pack(args.model, quiet=True)
    place(args.folder, recipe)
    began = time.monotonic()
    options = ReluOptions(
        str(base.path), tuple(map(Path, args.text)), tokens=args.tokens, every=args.every,
        resume=args.resume, device=args.device, quiet=True,
    )  # fmt: skip
    made = run(options, recipe)
    is_gpu = args.device != "cpu" and torch.cuda.is_available()
    history = [json.loads(line) for line in made.history.read_text().splitlines()]
    record(
        {"base": base.path.name, "device": torch.cuda.get_device_name() if is_gpu else "cpu"}
        | recipe.to_json() | about(made) | {"pack": made.pack.path.name}
        | {"history": history, "minutes": round((time.monotonic() - began) / 60, 2)},
        args.output,
    )  # fmt: skip


if __name__ == "__main__":
    main()
