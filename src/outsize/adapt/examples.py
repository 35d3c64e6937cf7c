"""Training examples: prompts and answers as tokens. Answers are given, or the model's own, which are made
once and kept in a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from outsize.adapt.answers import answer, batches
from outsize.adapt.processes import processes, shared
from outsize.adapt.trainable import TrainableModel
from outsize.arguments import whole
from outsize.engine import open_tokens
from outsize.errors import DataError, DiskFullError
from outsize.options import Options
from outsize.pack.format import Pack
from outsize.progress import steps
from outsize.system import memory
from outsize.text.prompt import encode
from outsize.text.prompt_file import Line, read
from outsize.text.tokens import Tokens

LEAST = 3  # tokens of an answer that can be learned from


class Example(NamedTuple):
    """A prompt and its answer, as tokens."""

    tokens: list[int]
    num_prompt: int


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
    memory: str | int = "auto"  # of this process, at most

    def __post_init__(self) -> None:
        memory.parse(self.memory)  # before a model is packed
        for name in ("max_tokens", "at_once", "every"):
            whole(name, getattr(self, name), 1, 1 << 24)

    @property
    def checkpoint(self) -> Path:
        return self.output.with_suffix(".checkpoint")

    @property
    def answers(self) -> Path:
        return self.output.with_suffix(".answers.jsonl")


def fingerprint(parts: object) -> str:
    """SHA-256 of what results depend on: numbers and texts, in lists and the like."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def prepare(
    options: TrainOptions, longest: int, pack: Pack, model: TrainableModel
) -> list[Example]:
    """Examples of at most `longest` tokens, in a fixed order. Raises DataError."""
    tokens, lines = open_tokens.tokens(pack), read(options.data)
    prompts = encode(pack, tokens, [line.prompt for line in lines], Options())
    room = longest - (options.max_tokens if options.own_answers else 0)
    short = [i for i, p in enumerate(prompts) if len(p) <= room]
    if not short:
        raise DataError(f"every prompt is longer than {room} tokens; give a larger --length")
    prompts = [prompts[i] for i in short]
    if options.own_answers:
        return examples(prompts, own_answers(options, prompts, pack, model), longest)
    return examples(prompts, given([lines[i] for i in short], pack, tokens), longest)


def given(lines: Sequence[Line], pack: Pack, tokens: Tokens) -> list[list[int]]:
    """The answers that came with the prompts, ended as the model ends."""
    missing = next((i for i, line in enumerate(lines, 1) if line.answer is None), None)
    if missing is not None:
        raise DataError(f"example {missing} has no answer; use --own-answers")
    return [[*tokens.encode(str(line.answer), start=False), *pack.eos[:1]] for line in lines]


def own_answers(
    options: TrainOptions, prompts: Sequence[list[int]], pack: Pack, model: TrainableModel
) -> list[list[int]]:
    """The model's greedy answers, as far as they are not kept already; of several processes each makes a
    part, and has all."""
    about = {
        "base": pack.source.sha256, "encoding": pack.source.layout, "max_tokens": options.max_tokens,
        "ends": sorted(pack.eos), "numbers": str(model.dtype), "prompts": fingerprint(prompts),
    }  # fmt: skip
    rank, world = processes()
    kept, ends = Kept(options.answers, about, rank == 0), frozenset(pack.eos)
    missing = [i for i in range(len(prompts)) if i not in kept.answers]
    with steps(options.quiet) as draw:
        for together in batches(prompts, missing, options.at_once * world):
            mine = [prompts[i] for i in together[rank::world]]
            made = answer(model, mine, options.max_tokens, ends) if mine else []
            kept.add(together, shared(made, len(together), options.max_tokens, model.device))
            draw("answering", len(kept.answers), len(prompts))
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


class Kept:
    """A file of answers, appended to batch by batch: a killed run goes on where it was."""

    def __init__(self, path: Path, about: Mapping[str, object], writes: bool = True) -> None:
        """`about`: what the answers depend on; a file that says something else is begun anew. `writes`: False
        for all but one of several processes."""
        self.path, self._head, self._writes = path, json.dumps(dict(about), sort_keys=True), writes
        self.answers: dict[int, list[int]] = {}
        try:
            lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
            # The last line may be cut short.
            whole = lines[:-1] if lines[:1] == [self._head] else [self._head]
            self.answers = {int(k): list(map(int, v)) for k, v in map(json.loads, whole[1:])}
        except (ValueError, TypeError) as e:
            raise DataError(
                f"{path} is damaged ({e}); remove it, and answers are made anew"
            ) from None
        if writes and [*whole, ""] != lines:
            self._put("w", "\n".join([*whole, ""]))

    def add(self, indices: Sequence[int], answers: Sequence[list[int]]) -> None:
        rows = list(zip(indices, answers, strict=True))
        self.answers |= dict(rows)
        if self._writes:
            self._put("a", "".join(json.dumps([i, a]) + "\n" for i, a in rows))

    def _put(self, mode: str, text: str) -> None:
        try:
            with self.path.open(mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as e:
            raise DiskFullError(
                f"{self.path} could not be written ({e.strerror}); answers that are there stay: make room, "
                "and start again"
            ) from None
