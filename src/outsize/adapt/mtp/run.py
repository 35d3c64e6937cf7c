"""`outsize adapt`: recipes that make something new from a pack."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from outsize.adapt.mtp import train
from outsize.adapt.mtp.answered import Kept, examples, fingerprint, own_answers
from outsize.adapt.mtp.losses import Example, Recipe
from outsize.adapt.processes import leave, processes
from outsize.adapt.trainable import TrainableModel
from outsize.arguments import whole
from outsize.engine import load as loading
from outsize.errors import DataError, OptionError
from outsize.log import say
from outsize.options import Options
from outsize.pack import fetch
from outsize.pack.format import Pack
from outsize.plan.probe import instruction_sets
from outsize.progress import bars, steps
from outsize.text.prompt import encode
from outsize.text.prompt_file import Line, read
from outsize.text.tokens import Tokens

HELD_OUT_SHARE, HELD_OUT = 50, 64  # one in so many, at most so many


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """What to train on, and where."""

    model: str
    data: tuple[Path, ...]
    output: Path
    own_answers: bool = True
    max_tokens: int = 128  # of an answer
    at_once: int = 16  # answers
    every: int = 100  # steps between checkpoints
    resume: bool = False
    device: str = "auto"
    quiet: bool = False

    def __post_init__(self) -> None:
        for name in ("max_tokens", "at_once", "every"):
            whole(name, getattr(self, name), 1, 1 << 24)

    @property
    def checkpoint(self) -> Path:
        return self.output.with_suffix(".checkpoint")

    @property
    def answers(self) -> Path:
        return self.output.with_suffix(".answers.jsonl")


def masks(wish: TrainOptions, recipe: Recipe) -> None:
    """Train a mask drafter. Raises OutsizeError."""
    if wish.resume and not wish.checkpoint.is_file():
        raise OptionError(f"there is no checkpoint {wish.checkpoint} to resume; leave out --resume")
    device = join(wish.device)
    try:
        _masks(wish if processes()[0] == 0 else replace(wish, quiet=True), recipe, device)
    finally:
        leave()


def _masks(wish: TrainOptions, recipe: Recipe, device: torch.device) -> None:
    made = fetch.find(wish.model) or fetch.pack(wish.model, quiet=wish.quiet)
    with bars(wish.quiet) as progress:
        twin = TrainableModel(made, device, matmul_type(device), progress)
    found = prepare(wish, recipe, made, twin)
    count = min(HELD_OUT, len(found) // HELD_OUT_SHARE)
    held_out, rest = found[:count], found[count:]
    base, data = made.source.sha256, fingerprint(found)
    run = (
        train.resume(twin, recipe, base, wish.checkpoint, data)
        if wish.resume
        else train.start(twin, recipe, base, data)
    )
    with steps(wish.quiet) as draw:

        def tell(seen: train.Seen) -> None:
            what = f"loss {seen.loss:.3f}, {seen.tokens_per_step:.2f} tokens/step"
            draw(what, seen.step, seen.steps)

        train.train(run, rest, held_out, wish.checkpoint, wish.every, tell)
    run.write(wish.output)
    if processes()[0] == 0:
        wish.checkpoint.unlink(missing_ok=True)
    if not wish.quiet:
        say(
            f"wrote {wish.output} ({wish.output.stat().st_size / 1e6:.1f} MB): {run.tokens_per_step:.2f} "
            f"tokens a step on {count} held-out answers; use it with --draft masks:{wish.output}"
        )


def join(device: str) -> torch.device:
    """The device to train on; joins the other processes if torchrun started several."""
    if device not in ("auto", "cpu", "cuda"):
        raise OptionError(f"device is {device!r}; auto, cpu or cuda is expected")
    if device == "cuda" and not torch.cuda.is_available():
        raise OptionError("device is cuda, but torch sees none here; use --device cpu")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    if kind == "cpu":
        return torch.device(kind)
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")))


def matmul_type(device: torch.device) -> torch.dtype:
    """What a device multiplies fastest: bf16, or fp32 on processors without instructions for it."""
    quick = {"avx512_bf16", "amx_bf16", "bf16"} & set(instruction_sets())
    return torch.bfloat16 if quick or device.type == "cuda" else torch.float32


def prepare(wish: TrainOptions, recipe: Recipe, made: Pack, twin: TrainableModel) -> list[Example]:
    """Examples in tokens, in a fixed order: the held-out ones first."""
    tokens, lines = loading.tokens(made), read(wish.data)
    prompts = encode(made, tokens, [line.prompt for line in lines], Options())
    room = recipe.length - (wish.max_tokens if wish.own_answers else 0)
    short = [i for i, p in enumerate(prompts) if len(p) <= room]
    if not short:
        raise DataError(f"every prompt is longer than {room} tokens; give a larger --length")
    prompts, lines = [prompts[i] for i in short], [lines[i] for i in short]
    if not wish.own_answers:
        return examples(prompts, given(lines, made, tokens), recipe.length)
    about = {
        "base": made.source.sha256, "encoding": made.source.layout, "max_tokens": wish.max_tokens,
        "ends": sorted(made.eos), "numbers": str(twin.dtype), "prompts": fingerprint(prompts),
    }  # fmt: skip
    kept = Kept(wish.answers, about, processes()[0] == 0)
    with steps(wish.quiet) as draw:
        answers = own_answers(
            twin, prompts, kept, wish.max_tokens, frozenset(made.eos), wish.at_once,
            lambda done, total: draw("answering", done, total),
        )  # fmt: skip
    return examples(prompts, answers, recipe.length)


def given(lines: Sequence[Line], made: Pack, tokens: Tokens) -> list[list[int]]:
    """The answers that came with the prompts, ended as the model ends."""
    missing = next((i for i, line in enumerate(lines, 1) if line.answer is None), None)
    if missing is not None:
        raise DataError(f"example {missing} has no answer; use --own-answers")
    return [[*tokens.encode(str(line.answer), start=False), *made.eos[:1]] for line in lines]
