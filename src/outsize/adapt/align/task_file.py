"""A task: prompts, and what an answer to each is checked for. JSON:

    {"name": "five words",
     "prompts": [{"prompt": "Name a fruit in exactly two words.", "check": {"kind": "words", "count": 2}}]}

One prompt in four is held out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from outsize.adapt.align.checks import Check, parse
from outsize.checkpoint.bounded import read_regular
from outsize.checkpoint.read_json import loads
from outsize.errors import DataError

MOST_BYTES, MOST_PROMPTS = 16 << 20, 100_000
HELD_OUT = 4  # one prompt in so many
LEAST = 4  # prompts
LONGEST = 200  # characters of a name


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, and what is asked of its answer."""

    text: str
    check: Check


@dataclass(frozen=True, slots=True)
class TaskFile:
    """All prompts; those to train on and those to measure on. `sha256`: of the file."""

    name: str
    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    sha256: str


def read(path: Path) -> TaskFile:
    """Raises DataError."""
    raw = read_regular(path, MOST_BYTES, DataError)
    try:
        told = loads(raw)
    except ValueError as e:
        raise DataError(f"{path} is not JSON ({e})") from None
    if not isinstance(told, dict) or not isinstance(told.get("prompts"), list):
        raise DataError(f"{path} has no list of prompts; an object with prompts is expected")
    if unknown := sorted(set(told) - {"name", "prompts"}):
        raise DataError(
            f"{path} has {str(unknown[0])[:40]!r}; a task has a name and prompts, each with a check of known "
            "kind, and no code is run from a file"
        )
    listed = told["prompts"]
    if not LEAST <= len(listed) <= MOST_PROMPTS:
        raise DataError(
            f"{path} has {len(listed):,} prompts; from {LEAST} to {MOST_PROMPTS:,} are expected, of which "
            f"one in {HELD_OUT} is held out"
        )
    found = [_prompt(path, number, item) for number, item in enumerate(listed, 1)]
    first = dict[Prompt, int]()
    for number, prompt in enumerate(found, 1):
        if first.setdefault(prompt, number) != number:
            raise DataError(
                f"{path}, prompt {number}: it is prompt {first[prompt]} again, and what is trained on is "
                "not to be measured on; give each once"
            )
    train = tuple(p for i, p in enumerate(found) if i % HELD_OUT != HELD_OUT - 1)
    held_out = tuple(p for i, p in enumerate(found) if i % HELD_OUT == HELD_OUT - 1)
    name = told.get("name", path.stem)
    if not isinstance(name, str) or len(name) > LONGEST or not name.isprintable():
        raise DataError(f"{path}: its name is no text of at most {LONGEST} printable characters")
    return TaskFile(name, train, held_out, hashlib.sha256(raw).hexdigest())


def _prompt(path: Path, number: int, item: object) -> Prompt:
    try:
        if (
            not isinstance(item, dict)
            or not isinstance(item.get("prompt"), str)
            or not item["prompt"]
        ):
            raise DataError("it has no prompt, a text")
        if unknown := sorted(set(item) - {"prompt", "check"}):
            raise DataError(
                f"it has {str(unknown[0])[:40]!r}, and prompt and check are all that it may have"
            )
        return Prompt(item["prompt"], parse(item.get("check")))
    except DataError as e:
        raise DataError(f"{path}, prompt {number}: {e}") from None
