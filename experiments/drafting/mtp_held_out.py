"""What trained mask drafters accept on held-out prompts, as `mtp_train` says of those that it trains itself.

    python -m experiments.drafting.mtp_held_out FILE... --model MODEL --held-out prompts.held-out.jsonl [...]

One JSON line for each file and file of prompts: tokens a step at k = 1..k, linear and quadratic, over the
model's own greedy answers (made once, kept beside the prompts). A file without prompts is left out.
"""

from __future__ import annotations

from pathlib import Path

import torch

from experiments.runs import Row, arguments, record
from outsize.adapt.examples import Example, TrainOptions, prepare
from outsize.adapt.mtp.simulate import simulate
from outsize.adapt.trainable import TrainableModel, matmul_type
from outsize.checkpoint import lora
from outsize.options import DEFAULT_MODEL
from outsize.pack import fetch
from outsize.progress import silent


def accepted(twin: TrainableModel, path: Path, found: list[Example], at_once: int) -> Row:
    file = lora.load(path)
    parameters = {name: t.to(twin.device, torch.float32) for name, t in file.tensors.items()}
    (rank,) = {a[0] for a, _ in file.factors().values()}
    row: Row = {"bytes": path.stat().st_size, "rank": rank, "answers": len(found)}
    for k in range(1, len(parameters["masks"]) + 1):
        w = simulate(twin, parameters, file.scale, found, k, at_once)
        row |= {f"k{k}_quadratic": w.by_quadratic, f"k{k}_linear": w.by_linear}
    return row


def main() -> None:
    a = arguments(
        __doc__, "files+", model=DEFAULT_MODEL, held_out=[Path("prompts.held-out.jsonl")],
        count=(200, "prompts of each file"), max_tokens=128, length=768,
    )  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    at_once = (256, 16) if device.type == "cuda" else (8, 4)
    made = fetch.pack(a.model, quiet=True)
    twin = TrainableModel(made, device, matmul_type(device), silent)
    for prompts in a.held_out:
        if not prompts.read_text().strip():
            continue
        beside = prompts.with_suffix(".safetensors")
        wish = TrainOptions(a.model, (prompts,), beside, True, a.max_tokens, at_once[0], quiet=True)
        found = prepare(wish, a.length, made, twin)[: a.count]
        for name in a.files:
            row = accepted(twin, Path(name), found, at_once[1])
            record({"held_out": prompts.stem, "file": Path(name).name, **row}, a.output)


if __name__ == "__main__":
    main()
