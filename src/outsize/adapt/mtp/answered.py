"""Training examples in tokens, kept beside the adapter, so that answers are made once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from outsize.adapt.answers import answer
from outsize.adapt.mtp.losses import Example
from outsize.adapt.processes import processes, shared
from outsize.adapt.trainable import TrainableModel
from outsize.errors import DataError

LEAST = 3  # tokens of an answer that masks can learn from


def fingerprint(parts: object) -> str:
    """SHA-256 of what results depend on: numbers and texts, in lists and the like."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Kept:
    """A file of answers, appended to batch by batch: a killed run goes on where it was."""

    def __init__(self, path: Path, about: Mapping[str, object], writes: bool = True) -> None:
        """`about`: what the answers depend on; a file that says something else is begun anew. `writes`: False
        for all but one of several processes."""
        self.path, self._head, self._writes = path, json.dumps(dict(about), sort_keys=True), writes
        self.answers: dict[int, list[int]] = {}
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        whole = (
            lines[:-1] if lines[:1] == [self._head] else [self._head]
        )  # the last may be cut short
        try:
            self.answers = {int(k): list(v) for k, v in map(json.loads, whole[1:])}
        except (ValueError, TypeError) as e:
            raise DataError(
                f"{path} is damaged ({e}); remove it, and answers are made anew"
            ) from None
        if writes and [*whole, ""] != lines:
            path.write_text("\n".join([*whole, ""]), encoding="utf-8")

    def add(self, indices: Sequence[int], answers: Sequence[list[int]]) -> None:
        rows = list(zip(indices, answers, strict=True))
        self.answers |= dict(rows)
        if self._writes:
            text = "".join(json.dumps([i, a]) + "\n" for i, a in rows)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)


def own_answers(
    twin: TrainableModel,
    prompts: Sequence[list[int]],
    kept: Kept,
    max_tokens: int,
    ends: frozenset[int],
    at_once: int,
    tell: Callable[[int, int], None],
) -> list[list[int]]:
    """The model's greedy answers, as far as they are not kept already; of several processes each makes a
    part, and has all. Prompts of like length go together."""
    rank, world = processes()
    missing = [i for i in range(len(prompts)) if i not in kept.answers]
    missing.sort(key=lambda i: (len(prompts[i]), i))
    for start in range(0, len(missing), at_once * world):
        together = missing[start : start + at_once * world]
        mine = [prompts[i] for i in together[rank::world]]
        made = answer(twin, mine, max_tokens, ends) if mine else []
        kept.add(together, shared(made, len(together), max_tokens, twin.device))
        tell(len(kept.answers), len(prompts))
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
