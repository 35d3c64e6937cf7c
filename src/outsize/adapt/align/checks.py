"""What an answer is rewarded for: checks by name, each a function of this file. A task's file gives a check's
name and its numbers or words, never code."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from outsize.errors import DataError

WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
MOST = 10_000  # words, letters, lines
LONGEST = 200  # characters of a text that an answer must have


@dataclass(frozen=True, slots=True)
class Check:
    """One check, and what it is told."""

    kind: str
    count: int = 0
    text: str = ""

    def passes(self, answer: str) -> bool:
        return CHECKS[self.kind](answer.strip(), self)


def words(answer: str) -> list[str]:
    return WORD.findall(answer)


def _json(answer: str, check: Check) -> bool:
    """An object; of the key that is named, if one is."""
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and (not check.text or check.text in found)


CHECKS: Mapping[str, Callable[[str, Check], bool]] = {
    "words": lambda a, c: len(words(a)) == c.count,
    "most_words": lambda a, c: 0 < len(words(a)) <= c.count,
    "lines": lambda a, c: len([x for x in a.splitlines() if x.strip()]) == c.count,
    "letters": lambda a, c: a.lower().count(c.text.lower()) == c.count,
    "starts": lambda a, c: a.startswith(c.text),
    "ends": lambda a, c: a.endswith(c.text),
    "contains": lambda a, c: c.text.lower() in a.lower(),
    "lower": lambda a, c: bool(words(a)) and a == a.lower(),
    "upper": lambda a, c: bool(words(a)) and a == a.upper(),
    "json": _json,
}
EDGES = {"starts": str.lstrip, "ends": str.rstrip}  # what of a text an answer can have there
COUNTED = ("words", "most_words", "lines", "letters")
TOLD = ("starts", "ends", "contains", "letters")  # a text


def parse(value: object) -> Check:
    """Of what a task's file says. Raises DataError."""
    if not isinstance(value, dict):
        raise DataError(f"a check is an object with a kind, not {str(value)[:40]!r}")
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in CHECKS:
        raise DataError(
            f"a check of kind {str(kind)[:40]!r} is not known; known are {', '.join(CHECKS)}, and no code is "
            "run from a file"
        )
    if unknown := sorted(set(value) - {"kind", "count", "text"}):
        raise DataError(
            f"a check has {str(unknown[0])[:40]!r}, and kind, count and text are all that it may have"
        )
    count, text = value.get("count"), value.get("text")
    is_whole = isinstance(count, int) and not isinstance(count, bool) and 0 <= count <= MOST
    if (kind in COUNTED) != (count is not None) or (count is not None and not is_whole):
        due = f"a count from 0 to {MOST:,}" if kind in COUNTED else "no count"
        raise DataError(f"check {kind}: count is {str(count)[:40]}; {due} is expected")
    needs = kind in TOLD
    if (text is not None and not needs and kind != "json") or (needs and not text):
        raise DataError(
            f"check {kind}: text is {str(text)[:40]!r}; {'one' if needs else 'none'} is expected"
        )
    if text is not None and (not isinstance(text, str) or len(text) > LONGEST):
        raise DataError(f"check {kind}: its text is none of at most {LONGEST} characters")
    if kind in ("starts", "ends") and (edge := EDGES[kind](str(text))) != text:
        raise DataError(
            f"check {kind}: no answer passes for {text!r}, since answers are looked at without spaces around "
            f"them; {edge!r} is expected"
        )
    if kind == "most_words" and count == 0:
        raise DataError("check most_words: count is 0, and an answer of no word never passes")
    return Check(kind, int(str(count)) if is_whole else 0, str(text) if text is not None else "")
