"""The text that weights are fitted to: a user's, or the model's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from outsize.adapt.answers import answer
from outsize.adapt.statistics import LENGTH
from outsize.adapt.trainable import TrainableModel
from outsize.checkpoint.bounded import text_lines
from outsize.engine import load as loading
from outsize.errors import DataError
from outsize.model_config import Description
from outsize.pack.format import Pack
from outsize.progress import Progress

TIMES = 8  # tokens for each input of the widest map: with fewer, errors are fitted to the text
HELD_OUT = 1024  # tokens more, on which quality is measured
OWN = "its own text"


@dataclass(frozen=True, slots=True)
class Calibration:
    """Tokens to fit to, and others to measure on; each sequence of them begins with `start`."""

    tokens: Sequence[int]
    held_out: Sequence[int]
    start: tuple[int, ...]
    text: str  # which


def due(d: Description) -> int:
    """Tokens to fit to."""
    return TIMES * max(d.ffn_width, d.width, d.num_heads * d.head_dim)


def start_of(pack: Pack) -> tuple[int, ...]:
    return () if pack.bos is None or not pack.add_bos else (pack.bos,)


def read(path: Path) -> str:
    """A text. Raises DataError."""
    return "\n".join(text_lines(path, DataError))


def given(pack: Pack, text: str, name: str) -> Calibration:
    """The beginning of a text. Raises DataError."""
    need = due(pack.description) + HELD_OUT
    tokens, found = loading.tokens(pack), list[int]()
    for line in text.splitlines(keepends=True):
        found += tokens.encode(line, start=False)
        if len(found) >= need:
            break
    if len(found) < need:
        raise DataError(
            f"{name} has {len(found):,} tokens, and this model needs {need:,}: {TIMES} for each of a map's "
            f"{due(pack.description) // TIMES:,} inputs, and {HELD_OUT:,} to measure on; give a longer text"
        )
    return Calibration(found[HELD_OUT:need], found[:HELD_OUT], start_of(pack), name)


@torch.inference_mode()
def own(pack: Pack, model: TrainableModel, seed: int, progress: Progress) -> Calibration:
    """What the model says by itself, at temperature 1, from a text's first token on."""
    d, ends = pack.description, sorted(pack.eos)
    first = pack.bos if pack.bos is not None else ends[0] if ends else 0
    each = LENGTH - 1
    need = due(d) + HELD_OUT
    count, at_once, made = math.ceil(need / each), 32, list[int]()
    generator = torch.Generator().manual_seed(seed)
    for begin in range(0, count, at_once):
        progress("sampling a text", begin, count)
        prompts = [[first]] * min(at_once, count - begin)
        for tokens in answer(model, prompts, each, frozenset(), generator):
            made += tokens
    return Calibration(made[HELD_OUT:need], made[:HELD_OUT], start_of(pack), OWN)
