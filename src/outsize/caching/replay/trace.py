"""Recorded routing: which experts each layer asked for, token by token, as CSV with comments.

Columns, in any order: turn, phase (0 prompt, 1 decoding), step (the token), layer, slot, expert, weight;
and, if the recorder had them, early and early_weight: the expert that this layer's gate would have put in
this slot had it been asked one layer earlier. Others are ignored. Expert -1: only `early` is given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from outsize.caching.prefetcher import Scored
from outsize.checkpoint.bounded import text_lines
from outsize.errors import TraceError

NEEDED = ("phase", "step", "layer", "slot", "expert", "weight")
WHOLE = ("turn", "phase", "step", "layer", "slot", "expert", "early")  # columns of whole numbers
MOST = 1 << 40  # of any number in a trace
MAX_SHAPE = 1 << 18  # layers times experts; the largest models have 24,000
MAX_MEMORY = 240 << 20  # bytes that events may take: of 8 experts a token about 2 million rows
EVENT, STEP, ROW = 300, 250, 60  # bytes of one; a step is a token's part of an event
MAX_COMMENTS = 100_000


@dataclass(frozen=True, slots=True)
class Event:
    """What one layer asks for in one pass: of a prompt, all its tokens together. Ids count through the
    layers: layer * num_experts + expert."""

    number: int  # of the pass
    phase: int
    layer: int
    tokens: int
    ids: tuple[int, ...]
    weights: tuple[float, ...]  # the most that a token made of each
    rows: tuple[tuple[int, ...], ...] = ()  # the same, token by token
    early: Scored = ()  # what the gate said one layer earlier


WIDE = 16  # tokens: a longer prompt's experts are asked for by their numbers


@dataclass(frozen=True, slots=True)
class Trace:
    """Events in the order in which they happen."""

    name: str
    layers: int
    experts: int
    used: int  # by one token in one layer
    record_bytes: int | None
    events: tuple[Event, ...]

    @property
    def size(self) -> int:
        return self.layers * self.experts


@dataclass(slots=True)
class _Rows:
    """The rows of one layer in one pass so far."""

    number: int
    turn: int
    phase: int
    layer: int
    steps: dict[int, list[int]]
    weights: dict[int, float]
    early: dict[int, float]


def read(path: Path) -> Trace:
    """Raises TraceError, naming the line."""
    lines = enumerate(text_lines(path, TraceError), 1)
    comments, first = _head(path, lines)
    layers, experts, used = (
        _stated(path, comments, f"n_{k}") for k in ("layer", "expert", "expert_used")
    )
    if layers * experts > MAX_SHAPE:
        raise TraceError(
            f"{path}: {layers:,} layers of {experts:,} experts; up to {MAX_SHAPE:,} experts in all are known"
        )
    sizes = [int(n) for line in comments for n in re.findall(r"expert_bytes=(\d{1,15})\b", line)]
    events = tuple(_events(path, first, lines, layers, experts))
    name = path.name.removesuffix(".gz").removesuffix(".csv").removesuffix(".route")
    return Trace(name, layers, experts, used, max(sizes, default=0) or None, events)


def _head(path: Path, lines: Iterator[tuple[int, str]]) -> tuple[list[str], tuple[int, str]]:
    """The comments before the columns, and the numbered line that names those. Raises TraceError."""
    comments: list[str] = []
    for number, line in lines:
        if line and not line.startswith("#"):
            return comments, (number, line)
        comments.append(line[:1000])
        if number > MAX_COMMENTS:
            raise TraceError(
                f"{path}: more than {MAX_COMMENTS:,} lines of comments; is it a trace?"
            )
    _stated(path, comments, "n_layer")
    raise TraceError(f"{path} holds no rows")


def _stated(path: Path, comments: Sequence[str], key: str) -> int:
    found = [int(n) for line in comments for n in re.findall(rf"\b{key}=(\d{{1,15}})\b", line)]
    if not found or not 0 < found[0] <= 1 << 16:
        raise TraceError(f"{path} does not state {key}=N in its comments (# lines)")
    return found[0]


def _events(
    path: Path, first: tuple[int, str], lines: Iterator[tuple[int, str]], layers: int, experts: int
) -> Iterator[Event]:
    columns = first[1].split(",")
    if missing := [name for name in NEEDED if name not in columns]:
        raise TraceError(f"{path}:{first[0]}: no column {', '.join(missing)}; got {first[1][:80]}")
    now: _Rows | None = None
    last: tuple[int, ...] = ()
    size = 0
    for number, text in lines:
        if not text or text.startswith("#"):
            continue
        row = _numbers(f"{path}:{number}", columns, text.split(","), layers, experts)
        turn, phase, step, layer = (int(row[k]) for k in ("turn", "phase", "step", "layer"))
        if (
            now is None
            or (turn, phase, layer) != (now.turn, now.phase, now.layer)
            or (phase == 1 and step not in now.steps)
        ):
            pass_number = 0
            if now is not None:
                yield _event(now, experts)
                same = (turn, phase) == (now.turn, now.phase) and layer > now.layer
                pass_number = now.number if same else now.number + 1
            size += EVENT
            now = _Rows(pass_number, turn, phase, layer, {}, {}, {})
        order = (turn, phase, layer, step) if phase == 0 else (turn, phase, step, layer)
        if order < last:
            raise TraceError(
                f"{path}:{number}: step {step} of layer {layer} comes after a later one; prompts are "
                "ordered by layer and step, decoding by step and layer"
            )
        last = order
        size += ROW if step in now.steps else ROW + STEP
        if size > MAX_MEMORY:
            raise TraceError(
                f"{path}:{number}: the events up to here take more than {MAX_MEMORY:,} bytes of memory; "
                "record fewer prompts or tokens"
            )
        chosen = now.steps.setdefault(step, [])
        if row["expert"] >= 0:
            chosen.append(layer * experts + int(row["expert"]))
        for key, into in (("expert", now.weights), ("early", now.early)):
            expert, weight = int(row[key]), row["weight" if key == "expert" else "early_weight"]
            if expert >= 0:
                into[expert] = max(into.get(expert, 0.0), weight)
    if now is not None:
        yield _event(now, experts)


def _numbers(
    where: str, columns: Sequence[str], values: Sequence[str], layers: int, experts: int
) -> Mapping[str, float]:
    row = {"turn": 0.0, "early": -1.0, "early_weight": 0.0}
    try:
        row |= {
            k: float(v) for k, v in zip(columns, values, strict=True) if k in row or k in NEEDED
        }
    except ValueError:
        raise TraceError(
            f"{where}: {len(columns)} numbers are expected, got {str(values)[:80]}"
        ) from None
    for key, value in row.items():
        if not abs(value) <= MOST or (key in WHOLE and value != math.floor(value)):
            raise TraceError(f"{where}: {key} {value:g}; a number, or a whole one, is expected")
    for key, limit in (("expert", experts), ("early", experts), ("layer", layers)):
        if not row[key] < limit or row[key] < (0 if key == "layer" else -1):
            raise TraceError(f"{where}: {key} {row[key]:g} is out of range, 0 to {limit - 1}")
    if row["phase"] not in (0, 1):
        raise TraceError(f"{where}: phase {row['phase']:g}; 0 (prompt) or 1 (decoding) is expected")
    return row


def _event(rows: _Rows, experts: int) -> Event:
    base, weights = rows.layer * experts, rows.weights
    if rows.phase == 0 and len(rows.steps) > WIDE:
        weights = dict(sorted(weights.items()))
    early = tuple(sorted(rows.early.items(), key=lambda item: -item[1]))
    return Event(
        rows.number, rows.phase, rows.layer, len(rows.steps),
        tuple(base + e for e in weights), tuple(weights.values()),
        tuple(tuple(ids) for ids in rows.steps.values()), early,
    )  # fmt: skip


def waves(events: Sequence[Event], room: int) -> list[Event]:
    """The events, with those that ask for more than fits at once cut into several."""
    return [part for event in events for part in _parts(event, room)]


def _parts(event: Event, room: int) -> Iterator[Event]:
    if len(event.ids) <= room:
        yield event
        return
    for at in range(0, len(event.ids), room):
        piece, rows = slice(at, at + room), event.rows if at == 0 else ()
        yield replace(event, ids=event.ids[piece], weights=event.weights[piece], rows=rows)
