"""Training text: prompts, or prompts with answers, one a line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from outsize.checkpoint.bounded import text_lines
from outsize.checkpoint.read_json import loads
from outsize.errors import DataError

PROMPT_KEYS = ("prompt", "question", "instruction")
ANSWER_KEYS = ("answer", "response", "output", "completion")


class Line(NamedTuple):
    """One example, as text."""

    prompt: str
    answer: str | None


def read(paths: Sequence[Path]) -> list[Line]:
    """Lines of all files: plain text is a prompt a line; .jsonl has objects with a prompt (or question,
    instruction, turns, messages) and maybe an answer. .gz is unpacked. Raises DataError with the line."""
    found = [line for path in paths for line in _file(path)]
    if not found:
        raise DataError(f"{', '.join(str(p) for p in paths)}: no prompts; one a line is expected")
    return found


def _file(path: Path) -> Iterator[Line]:
    for number, text in enumerate(text_lines(path, DataError), 1):
        if text.strip():
            yield _line(path, number, text.strip())


def _line(path: Path, number: int, text: str) -> Line:
    if ".jsonl" not in path.suffixes:
        return Line(text, None)
    try:
        item = loads(text)
    except ValueError as e:
        raise DataError(f"{path}, line {number}: not JSON ({e})") from None
    if not isinstance(item, dict):
        raise DataError(f"{path}, line {number}: an object is expected, not {text[:40]!r}")
    prompt, answer = _said(item)
    if not prompt:
        raise DataError(
            f"{path}, line {number}: no text under {', '.join(PROMPT_KEYS)}, turns or messages"
        )
    return Line(prompt, answer)


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
