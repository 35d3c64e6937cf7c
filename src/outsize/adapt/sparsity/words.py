"""The text that sparsity is measured on: files of prose, or of prompts and answers, as sequences of
tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from outsize.adapt.calibration import read, start_of
from outsize.adapt.statistics import sequences
from outsize.engine import open_tokens
from outsize.errors import DataError
from outsize.pack.format import Pack
from outsize.text import prompt_file

LENGTH = 512  # tokens of a sequence, or the model's context
LEAST = 6  # sequences: to fit to, to set thresholds by, to measure on
PART = 4  # one sequence in so many is held out


@dataclass(frozen=True, slots=True)
class Words:
    """Token ids (B, T) to fit to, and others to measure on. `text`: which."""

    ids_BT: Tensor
    held_out_BT: Tensor
    text: str
    fingerprint: str


def words(pack: Pack, paths: Sequence[Path], most: int, longest: int | None = None) -> Words:
    """Up to `most` tokens in equal parts of all files, in sequences of `longest`. Raises DataError where
    there are too few."""
    length = min(longest or LENGTH, pack.description.context)
    start, encode = start_of(pack), partial(open_tokens.tokens(pack).encode, start=False)
    found: list[int] = []
    for path in paths:
        part: list[int] = []
        for line in _lines(path):
            part += encode(line + "\n")
            if len(part) * len(paths) >= most:
                break
        found += part
    names = ", ".join(path.name for path in paths)
    if len(found) < LEAST * length:
        more = "give more --data" if len(found) < most else "read more --tokens of it"
        raise DataError(
            f"{names} gives {len(found):,} tokens, and {LEAST * length:,} are needed; {more}"
        )
    ids_BT = sequences(found, start, length)
    is_held = [i % PART == PART - 1 for i in range(len(ids_BT))]
    kept = [i for i, held in enumerate(is_held) if not held]
    apart = [i for i, held in enumerate(is_held) if held]
    print_of = hashlib.sha256(str(found).encode()).hexdigest()[:16]
    return Words(ids_BT[kept], ids_BT[apart], names, print_of)


def spread(ids_BT: Tensor, count: int) -> Tensor:
    """So many of the sequences, from all over the text; all, where there are no more."""
    count = min(count, len(ids_BT))
    return ids_BT[[i * len(ids_BT) // count for i in range(count)]]


def _lines(path: Path) -> Iterator[str]:
    """Raises DataError."""
    if ".jsonl" in path.suffixes:
        for line in prompt_file.read([path]):
            yield line.prompt if line.answer is None else f"{line.prompt}\n{line.answer}"
    else:
        yield from (line for line in read(path).splitlines() if line.strip())
