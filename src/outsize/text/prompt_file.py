"""Files of prompts, one a line, for training, tracing and benchmarks: plain text, or JSON objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from outsize.checkpoint.bounded import text_lines
from outsize.checkpoint.read_json import loads
from outsize.errors import DataError, OutsizeError

PROMPT_KEYS = ("prompt", "question", "instruction")
ANSWER_KEYS = ("answer", "response", "output", "completion")


class Line(NamedTuple):
    """One prompt, as text."""

    prompt: str
    answer: str | None = None
    category: str = "all"


def read(paths: Sequence[Path], error: type[OutsizeError] = DataError) -> list[Line]:
    """Lines of all files: a prompt a line. One that begins with {, and every one of a .jsonl, is an object
    with a prompt (or question, instruction, turns, messages), maybe an answer and a category. .gz is
    unpacked. Raises `error` with the line."""
    found = [line for path in paths for line in _file(path, error)]
    if not found:
        names = ", ".join(str(p) for p in paths)
        raise error(f"{names} holds no prompts; one a line is expected")
    return found


def _file(path: Path, error: type[OutsizeError]) -> Iterator[Line]:
    for number, text in enumerate(text_lines(path, error), 1):
        if text.strip():
            try:
                yield _line(text.strip(), ".jsonl" in path.suffixes)
            except ValueError as e:
                raise error(f"{path}, line {number}: {e}") from None


def _line(text: str, is_object: bool) -> Line:
    """Raises ValueError."""
    if not is_object and not text.startswith("{"):
        return Line(text)
    try:
        item = loads(text)
    except ValueError as e:
        raise ValueError(f"not JSON ({e})") from None
    if not isinstance(item, dict):
        raise ValueError(f"an object is expected, not {text[:40]!r}")
    prompt, answer = _said(item)
    if not prompt:
        raise ValueError(f"no text under {', '.join(PROMPT_KEYS)}, turns or messages")
    return Line(prompt, answer, str(item.get("category", "all")))


def _said(item: Mapping[str, object]) -> tuple[str | None, str | None]:
    turns, messages = item.get("turns"), item.get("messages")
    if isinstance(turns, list) and turns and isinstance(turns[0], str):
        return turns[0], None
    if isinstance(messages, list):
        said = {
            str(m.get("role")): str(m.get("content")) for m in messages[:2] if isinstance(m, dict)
        }
        return said.get("user"), said.get("assistant")
    return _first(item, PROMPT_KEYS), _first(item, ANSWER_KEYS)


def _first(item: Mapping[str, object], keys: Sequence[str]) -> str | None:
    return next((v for k in keys if isinstance(v := item.get(k), str) and v), None)
