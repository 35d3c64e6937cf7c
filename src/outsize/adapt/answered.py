"""Training examples in tokens, kept beside the adapter, so that answers are made once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from outsize.adapt.answers import in_batches
from outsize.adapt.masks import Example
from outsize.adapt.twin import Twin
from outsize.errors import DataError

LEAST = 3  # tokens of an answer that masks can learn from


class Kept:
    """A file of answers, appended to batch by batch: a killed run goes on where it was."""

    def __init__(self, path: Path, about: Mapping[str, object]) -> None:
        """`about`: what the answers depend on; a file that says something else is begun anew."""
        self.path, self._head = path, json.dumps(dict(about), sort_keys=True)
        self.answers: dict[int, list[int]] = {}
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        if lines[:1] == [self._head]:
            whole = lines[1:-1]  # what follows the last line's end was cut off
            self.answers = {int(k): v for k, v in (json.loads(line) for line in whole)}
        else:
            path.write_text(self._head + "\n", encoding="utf-8")

    def add(self, indices: Sequence[int], answers: Sequence[list[int]]) -> None:
        rows = list(zip(indices, answers, strict=True))
        self.answers |= dict(rows)
        text = "".join(json.dumps([i, a]) + "\n" for i, a in rows)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)


def own_answers(
    twin: Twin,
    prompts: Sequence[list[int]],
    kept: Kept,
    max_tokens: int,
    ends: frozenset[int],
    at_once: int,
    tell: Callable[[int, int], None],
) -> list[list[int]]:
    """The model's greedy answers, as far as they are not kept already."""
    missing = [i for i in range(len(prompts)) if i not in kept.answers]

    def done(rows: list[int], answers: list[list[int]]) -> None:
        kept.add([missing[r] for r in rows], answers)
        tell(len(kept.answers), len(prompts))

    in_batches(twin, [prompts[i] for i in missing], max_tokens, ends, at_once, done)
    return [kept.answers[i] for i in range(len(prompts))]


def examples(
    prompts: Sequence[list[int]], answers: Sequence[list[int]], longest: int
) -> list[Example]:
    """Those that fit. Raises DataError if none does."""
    pairs = zip(prompts, answers, strict=True)
    made = [Example(p + a, len(p)) for p, a in pairs if len(a) >= LEAST and len(p + a) <= longest]
    if not made:
        raise DataError(
            f"of {len(prompts)} examples none has from {LEAST} to {longest:,} tokens with its prompt; "
            "give others, or a larger --length"
        )
    return made
