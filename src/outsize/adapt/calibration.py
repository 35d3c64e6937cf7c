"""The text that weights are fitted to: a user's, or the model's own."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch

from outsize.adapt.answers import answer
from outsize.adapt.statistics import LENGTH
from outsize.adapt.trainable import TrainableModel
from outsize.checkpoint.bounded import text_lines
from outsize.engine import open_tokens
from outsize.errors import DataError
from outsize.model_config import Description
from outsize.pack.format import Pack
from outsize.progress import Progress

TIMES = 8  # tokens for each input of the widest map: with fewer, errors are fitted to the text
HELD_OUT = 1024  # tokens more, on which quality is measured
OWN = "its own text"
Encode = Callable[[str], list[int]]


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
    """Pieces from all over a text, or its beginning where it is short. Raises DataError."""
    need = due(pack.description) + HELD_OUT
    encode = partial(open_tokens.tokens(pack).encode, start=False)
    pieces = _pieces(encode, text, math.ceil(need / LENGTH)) or _beginning(encode, text, need)
    found = sum(len(piece) for piece in pieces)
    if found < need:
        raise DataError(
            f"{name} has {found:,} tokens, and this model needs {need:,}: {TIMES} for each of a map's "
            f"{due(pack.description) // TIMES:,} inputs, and {HELD_OUT:,} to measure on; give a longer text"
        )
    apart = max(1, HELD_OUT // LENGTH)
    kept = {(2 * i + 1) * len(pieces) // (2 * apart) for i in range(apart)}
    held_out = [t for i in sorted(kept) for t in pieces[i]]
    rest = [t for i, piece in enumerate(pieces) if i not in kept for t in piece]
    return Calibration(rest[: need - HELD_OUT], held_out[:HELD_OUT], start_of(pack), name)


def _pieces(encode: Encode, text: str, count: int) -> list[list[int]]:
    """So many pieces of LENGTH tokens, evenly apart, each from the beginning of a line on: a file that joins
    several texts has all of them fitted to. No pieces where some would be short."""
    lines = text.splitlines(keepends=True)
    starts = [0, *accumulate(map(len, lines))]
    firsts = [bisect_left(starts, i * len(text) // count) for i in range(count)]
    out = []
    for first, after in zip(firsts, [*firsts[1:], len(lines)], strict=True):
        piece = list[int]()
        for line in lines[first:after]:
            piece += encode(line)
            if len(piece) >= LENGTH:
                break
        if len(piece) < LENGTH:
            return []
        out.append(piece[:LENGTH])
    return out


def _beginning(encode: Encode, text: str, need: int) -> list[list[int]]:
    """In pieces of LENGTH tokens; fewer than needed where the text ends."""
    found = list[int]()
    for line in text.splitlines(keepends=True):
        found += encode(line)
        if len(found) >= need:
            break
    return [found[i : i + LENGTH] for i in range(0, min(len(found), need), LENGTH)]


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
