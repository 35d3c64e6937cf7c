"""Train mask drafters by a list of recipes and say what each accepts on held-out questions.

    python -m experiments.drafting.mtp_train --data prompts.jsonl --held-out prompts.held-out.jsonl \
        -o FOLDER [--answers-only] [--seconds 300] [--recipes '{"rank": 4, "seed": 1}' ...] [--at-once 3]

One JSON line a recipe: tokens a step at k = 1..4, linear and quadratic, on held-out questions and on held-out
prompts of the mix; the loss of the base model's own tokens before and after (it moves only where not gated);
tokens trained on a second, and the share of the machine's matmul peak that is.

What gating is worth, each arm as it would be trained (`next_token`: the ordinary tokens' own loss, without
which additions that are not gated are free to spoil them):

    --recipes '{}' '{"gated": false}' '{"gated": false, "next_token": 1.0}'
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from experiments.runs import Row, arguments, fresh, record
from outsize.adapt import loop
from outsize.adapt.examples import Example, TrainOptions, prepare
from outsize.adapt.mtp.losses import MtpRecipe, all_anchors, collate, deltas, ordinary
from outsize.adapt.mtp.simulate import simulate
from outsize.adapt.mtp.task import MtpTask
from outsize.adapt.trainable import TrainableModel, matmul_type
from outsize.options import DEFAULT_MODEL
from outsize.pack import fetch
from outsize.progress import silent


def answered(twin, made, path: Path, args, recipe: MtpRecipe) -> list[Example]:
    at_once = 256 if twin.device.type == "cuda" else 8
    beside = args.output / f"{path.stem}.safetensors"  # answers are kept beside what this would be
    wish = TrainOptions(args.model, (path,), beside, True, args.max_tokens, at_once, quiet=True)
    return prepare(wish, recipe.length, made, twin)


@torch.no_grad()
def base_loss(
    twin: TrainableModel, parameters, recipe: MtpRecipe, found: list[Example], added: bool
) -> float:
    """Of the answers' own tokens, in nats."""
    total, count = 0.0, 0
    for start in range(0, len(found), 8):
        part = found[start : start + 8]
        batch = collate(part, [all_anchors(e) for e in part]).to(twin.device)
        used = deltas(parameters, recipe.scale) if added and not recipe.gated else None
        x, _ = ordinary(twin, batch, used)
        for row, example in enumerate(part):
            places = torch.tensor(all_anchors(example), device=twin.device)
            logits = twin.logits(x[row, places]).float()
            label = batch.tokens_BS[row, places + 1]
            total += float(cross_entropy(logits, label, reduction="sum"))
            count += len(places)
    return total / count


def seconds(run: Callable[[], object], device: torch.device, first: int) -> float:
    """That a run takes, after a few."""
    for n in range(first + 10):
        if n == first:
            started = now(device)
        run()
    return (now(device) - started) / 10


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_flops(device: torch.device, kind: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=kind)
    return 2 * size**3 / seconds(lambda: a @ a, device, 3)


def step_flops(twin: TrainableModel, recipe: MtpRecipe, tokens: float, masks: float) -> float:
    """Of a step: ordinary tokens forward; masks forward and back to their inputs; two heads likewise."""
    d = twin.description
    layer = d.width * d.qkv_rows + d.num_heads * d.head_dim * d.width + 3 * d.width * d.ffn_width
    body, head = 2 * layer * d.num_layers, 2 * d.width * d.vocab_size
    heads = 2 if recipe.sampler else 1
    ordinary_part = tokens * body * (1 if recipe.gated else 2)
    if recipe.next_token:
        ordinary_part += 2 * recipe.batch * recipe.anchors * head
    return ordinary_part + 2 * masks * (body + heads * head)


def run(args, twin, made, data, held, recipe: MtpRecipe) -> dict:
    rest, mixed = data[: -args.mixed], data[-args.mixed :]
    if args.seconds:
        trial = loop.start(MtpTask(recipe, twin, rest), made.source.sha256)
        step_s = seconds(trial.run_step, twin.device, 5)
        recipe = replace(recipe, steps=int(args.seconds / step_s))
    state = loop.start(MtpTask(recipe, twin, rest, held[:32]), made.source.sha256)
    sizes = [len(e.tokens) for e in rest]
    num_tokens = recipe.batch * sum(sizes) / len(sizes)
    num_masks = recipe.batch * recipe.anchors * recipe.k
    started = time.perf_counter()
    seen = []

    def tell(now: loop.Training) -> None:
        if now.step % 50 == 0:
            seen.append((now.step, round(now.loss, 4)))
            if now.step % 400 == 0:
                state.write(args.output / f"{args.name}.safetensors")
            print(json.dumps({"recipe": args.name, "step": now.step, "of": recipe.steps,
                              "loss": round(now.loss, 4)}), file=sys.stderr, flush=True)  # fmt: skip

    loop.train(state, args.output / f"{args.name}.checkpoint", 1 << 30, tell)
    took = time.perf_counter() - started
    (args.output / f"{args.name}.checkpoint").unlink(missing_ok=True)
    out = {"name": args.name, "recipe": recipe.to_json(), "steps": recipe.steps, "took_s": took,
           "trained_tokens_per_s": recipe.steps * (num_tokens + num_masks) / took,
           "flops_share": step_flops(twin, recipe, num_tokens, num_masks) * recipe.steps / took
           / peak_flops(twin.device, twin.dtype),
           "loss": state.loss, "curve": seen}  # fmt: skip
    for name, found in (("gsm8k", held), ("mix", mixed)):
        for k in range(1, recipe.k + 1):
            w = simulate(twin, state.task.parameters, recipe.scale, found, k, 16)
            out |= {f"{name}_k{k}_quadratic": w.by_quadratic, f"{name}_k{k}_linear": w.by_linear}
    out["base_loss_before"] = base_loss(twin, state.task.parameters, recipe, held, False)
    out["base_loss_after"] = base_loss(twin, state.task.parameters, recipe, held, True)
    state.write(args.output / f"{args.name}.safetensors")
    return out


def one(args) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = fetch.pack(args.model, quiet=True)
    twin = TrainableModel(made, device, matmul_type(device), silent)
    recipe = MtpRecipe(**json.loads(args.recipes[0]))
    data = answered(twin, made, args.data, args, recipe)
    held = answered(twin, made, args.held_out, args, recipe)[: args.count]
    if args.answers_only:
        size = sum(len(e.tokens) for e in data)
        record({"examples": len(data), "held_out": len(held), "tokens": size})
        return
    if not 0 < args.mixed < len(data):
        raise SystemExit(
            f"--mixed is {args.mixed}, of {len(data)} prompts: some must be left to train on"
        )
    record(run(args, twin, made, data, held, recipe))


def many(args) -> None:
    """Several recipes at a time: one alone leaves a large GPU waiting for the processor."""
    names = ("data", "held_out", "output", "model", "seconds", "max_tokens", "count", "mixed")
    common = [w for n in names for w in ("--" + n.replace("_", "-"), str(getattr(args, n)))]

    def train(number: int) -> Row:
        told = "--name", f"{args.name}-{number}", "--recipes", args.recipes[number]
        return fresh("-m", "experiments.drafting.mtp_train", *common, *told)

    with ThreadPoolExecutor(args.at_once) as pool:
        for row in pool.map(train, range(len(args.recipes))):
            record(row, args.output / f"{args.name}.jsonl")


def main() -> None:
    args = arguments(
        __doc__, model=DEFAULT_MODEL, data=Path, held_out=Path, name="masks", recipes=["{}"], at_once=3,
        seconds=(0.0, "steps to fill this; 0: as told"), max_tokens=128,
        count=(200, "held-out questions"), mixed=(128, "prompts of --data that are held out"),
        answers_only=False,
    )  # fmt: skip
    args.output = args.output or Path()
    args.output.mkdir(parents=True, exist_ok=True)
    (many if len(args.recipes) > 1 else one)(args)


if __name__ == "__main__":
    main()
