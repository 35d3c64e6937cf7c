"""What a model is distilled on: running text, in pieces of equal length, and prompts with answers; some of
each is held out.

Shapes: B sequences, S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from outsize.adapt import calibration
from outsize.adapt.examples import Example, TrainOptions, prepare
from outsize.adapt.loop import Recipe
from outsize.adapt.trainable import TrainableModel
from outsize.engine import open_tokens
from outsize.errors import DataError, OptionError
from outsize.home import home
from outsize.pack.format import Pack

HELD_OUT = 16  # one sequence in so many
MOST_TEXT, MOST_ANSWERS = 8, 32  # at most so many of each


@dataclass(frozen=True, slots=True)
class Data:
    """Sequences to train on, and those to measure on: `held_out` by kind, "text" or "answers"."""

    train: Sequence[Example]
    held_out: dict[str, Sequence[Example]]


def placed(options: TrainOptions, pack: Pack, what: str) -> TrainOptions:
    """With a place for checkpoints and answers where none is given: in the home."""
    if options.output.name:
        return options
    folder = home() / "adapters"
    folder.mkdir(parents=True, exist_ok=True)
    return replace(options, output=folder / f"{what}-{pack.source.sha256[:12]}.safetensors")


def load(options: TrainOptions, longest: int, pack: Pack, model: TrainableModel) -> Data:
    """Of a .jsonl file the prompts, with `model`'s own answers or those that came with them; of another the
    text; no sequence longer than the model's context. Raises DataError, OptionError."""
    prompts = tuple(path for path in options.data if ".jsonl" in path.suffixes)
    texts = [path for path in options.data if path not in prompts]
    if not options.data:
        raise DataError("there is nothing to train on; give --data, a text or .jsonl with prompts")
    if longest < 2:
        raise OptionError(f"length is {longest}; 2 tokens at least, of which one is predicted")
    longest = min(longest, pack.description.context)
    train, held = list[Example](), dict[str, Sequence[Example]]()
    if texts:
        words = "\n".join(calibration.read(path) for path in texts)
        pieces = _pieces(pack, words, longest)
        if len(pieces) < 2:
            names = ", ".join(path.name for path in texts)
            raise DataError(
                f"{names} has no two pieces of {longest:,} tokens; give a longer text, or a smaller --length"
            )
        held["text"], kept = _apart(pieces, MOST_TEXT)
        train += kept
    if prompts:
        found = prepare(replace(options, data=prompts), longest, pack, model)
        if len(found) < 2:
            raise DataError(
                f"{len(found)} prompt is too few to train on some and measure on others"
            )
        held["answers"], kept = _apart(found, MOST_ANSWERS)
        train += kept
    return Data(train, held)


def _pieces(pack: Pack, text: str, length: int) -> list[Example]:
    start = calibration.start_of(pack)
    tokens = open_tokens.tokens(pack).encode(text, start=False)
    each = length - len(start)
    return [
        Example([*start, *tokens[at : at + each]], 1)
        for at in range(0, len(tokens) - each + 1, each)
    ]


def _apart(found: Sequence[Example], most: int) -> tuple[list[Example], list[Example]]:
    """Evenly spread ones that are held out, and the others."""
    count = min(most, max(1, len(found) // HELD_OUT))
    chosen = {(2 * i + 1) * len(found) // (2 * count) for i in range(count)}
    return [found[i] for i in sorted(chosen)], [e for i, e in enumerate(found) if i not in chosen]


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded sequences, and where in them something is predicted: row, column, and the token that follows."""

    tokens_BS: Tensor
    row_N: Tensor
    at_N: Tensor
    label_N: Tensor


def sample(examples: Sequence[Example], recipe: Recipe, step: int) -> list[Example]:
    """The sequences of one step: by step and seed alone."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    rows = torch.randint(len(examples), (recipe.batch,), generator=generator).tolist()
    return [examples[i] for i in rows]


def predicted(example: Example) -> int:
    """How many of its tokens are learned."""
    return len(example.tokens) - example.num_prompt


def collate(examples: Sequence[Example], device: torch.device) -> Batch:
    longest = max(len(e.tokens) for e in examples)
    tokens = torch.zeros(len(examples), longest, dtype=torch.long)
    rows, at = list[int](), list[int]()
    for i, example in enumerate(examples):
        tokens[i, : len(example.tokens)] = torch.tensor(example.tokens)
        rows += [i] * predicted(example)
        at += range(example.num_prompt - 1, len(example.tokens) - 1)
    row_N, at_N = torch.tensor(rows), torch.tensor(at)
    made = Batch(tokens, row_N, at_N, tokens[row_N, at_N + 1])
    return Batch(*(t.to(device) for t in (made.tokens_BS, made.row_N, made.at_N, made.label_N)))
