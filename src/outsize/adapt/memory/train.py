"""`outsize adapt memory --config`: train a small model from nothing, and write it as a checkpoint folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from outsize.adapt import checkpoints, loop
from outsize.adapt.memory.network import BASE, EPS, Shape, memory_norm
from outsize.adapt.memory.task import MemoryRecipe, MemoryTask
from outsize.adapt.memory.text import Text, encoded, new_tokenizer
from outsize.adapt.processes import join, leave, meet, processes
from outsize.adapt.trainable import matmul_type
from outsize.arguments import whole
from outsize.errors import DataError, OptionError
from outsize.log import say
from outsize.progress import steps

CONTEXT = 4  # times the sequences that are trained on
WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer.json"


@dataclass(frozen=True, slots=True)
class MemoryOptions:
    """What to train on, and where to."""

    data: tuple[Path, ...]
    output: Path  # a folder
    every: int = 100  # steps between checkpoints
    resume: bool = False
    device: str = "auto"
    quiet: bool = False

    def __post_init__(self) -> None:
        whole("every", self.every, 1, 1 << 24)
        if not self.data:
            raise OptionError("data names no text to train on; give --data FILE")

    @property
    def checkpoint(self) -> Path:
        return self.output / "training.checkpoint"


def train(options: MemoryOptions, recipe: MemoryRecipe) -> loop.Training:
    """Train, and write the folder. Raises OutsizeError."""
    if not options.resume and (options.output / WEIGHTS).exists():
        raise OptionError(f"{options.output} has a model already; name another folder")
    checkpoints.check(options.resume, options.checkpoint)
    device = join(options.device)
    try:
        return _train(options, recipe, device)
    finally:
        leave()


def _train(options: MemoryOptions, recipe: MemoryRecipe, device: torch.device) -> loop.Training:
    rank, _ = processes()
    text = _text(options, recipe)
    task = MemoryTask(recipe, text.train.long(), text.held_out.long(), device, matmul_type(device))
    about = "", _fingerprint(text)
    training = (
        loop.resume(task, options.checkpoint, *about)
        if options.resume
        else loop.start(task, *about)
    )
    with steps(options.quiet or rank > 0) as draw:

        def report(now: loop.Training) -> None:
            draw(f"loss {now.loss:.3f}, {now.summary()}", now.step, recipe.steps)

        loop.train(training, options.checkpoint, options.every, report)
    if rank == 0:
        write(options.output, task)
        options.checkpoint.unlink(missing_ok=True)
        if not options.quiet:
            size = (options.output / WEIGHTS).stat().st_size / 1e6
            say(
                f"wrote {options.output} ({size:.1f} MB): {training.summary()}; use it with `outsize run -m "
                f"{options.output}`, and make its table with `outsize adapt memory --tables {options.output}`"
            )
    return training


def _text(options: MemoryOptions, recipe: MemoryRecipe) -> Text:
    """The tokens. The first process trains the tokenizer, and keeps it where a resumed run finds it."""
    path = options.output / TOKENIZER
    if processes()[0] == 0 and not options.resume:
        _put(path, new_tokenizer(options.data, recipe.shape().vocab))
    meet()
    if not path.is_file():
        raise DataError(f"{path} is missing, which the checkpoint was trained with; train anew")
    return encoded(options.data, path.read_text(encoding="utf-8"), recipe.length)


def _put(path: Path, text: str) -> None:
    """A file of a model's folder. Raises OptionError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        why = f"{path} cannot be written: {e.strerror}"
        raise OptionError(f"{why}; name another folder") from None


def _fingerprint(text: Text) -> str:
    digest = hashlib.sha256(text.tokenizer.encode())
    for some in (text.train, text.held_out):
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()


def write(folder: Path, task: MemoryTask) -> None:
    """The trained model as a checkpoint, beside its tokenizer. Raises OptionError, DiskFullError."""
    shape = task.recipe.shape()
    text = json.dumps(config(shape, task.recipe.length), indent=1)
    _put(folder / "config.json", text)
    whole_of = {k: v.detach().bfloat16() for k, v in tensors(task.parameters, shape).items()}
    checkpoints.save(folder / WEIGHTS, whole_of, task.about())


def tensors(parameters: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """A checkpoint's: where layers share a norm, each has it. What has no feed-forward has one of zeros."""
    out = dict(parameters)
    for i in range(shape.layers):
        if shape.shared_norm:
            out[memory_norm(i)] = parameters[memory_norm(0)].clone()
    return out


def config(shape: Shape, length: int) -> dict[str, object]:
    """config.json."""
    made: dict[str, object] = {
        "model_type": "llama" if shape.is_base else "memoryllm",
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "head_dim": shape.width // shape.heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": CONTEXT * length,
        "rms_norm_eps": EPS,
        "rope_theta": BASE,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    return made if shape.is_base else made | {"dense_intermediate_size": shape.dense}
