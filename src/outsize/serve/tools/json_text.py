"""JSON as it comes, character by character: is it valid so far, and is it whole?"""

from __future__ import annotations

import re

CLOSES = {"{": "}", "[": "]"}
WORDS = {"t": "true", "f": "false", "n": "null"}
NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
NUMBERS = "-+.eE0123456789"
BLANK = " \t\r\n"


class Scanner:
    """One value. `push` says whether a character may come next; `done`, whether the value is whole. (A number
    alone is never known to be: an object, list, string or word is.)"""

    def __init__(self) -> None:
        self.done = False
        self._open: list[str] = []  # closers of what is open
        self._wants = "value"  # or key, key or }, value or ], colon, comma
        self._word = ""  # what is left of true, false or null
        self._number: str | None = None
        self._string = (
            0  # 0: in none; 1: in one; 2: after a backslash; 3 to 6: digits of \u left, and 2
        )
        self._is_key = False

    def push(self, c: str) -> bool:
        if self._string:
            return self._in_string(c)
        if self._word:
            return self._in_word(c)
        if self._number is not None:
            if c in NUMBERS:
                self._number += c
                return len(self._number) < 400
            if NUMBER.fullmatch(self._number) is None:
                return False
            self._number = None
            self._ended()
        return c in BLANK or (not self.done and self._begins(c))

    def _in_string(self, c: str) -> bool:
        if self._string == 2:
            self._string = 6 if c == "u" else 1
            return c in '"\\/bfnrtu'
        if self._string > 2:
            self._string = self._string - 1 if self._string > 3 else 1
            return c in "0123456789abcdefABCDEF"
        if c == "\\":
            self._string = 2
        elif c == '"':
            self._string = 0
            if self._is_key:
                self._is_key, self._wants = False, "colon"
            else:
                self._ended()
        return c >= " "

    def _in_word(self, c: str) -> bool:
        good, self._word = c == self._word[0], self._word[1:]
        if not self._word:
            self._ended()
        return good

    def _ended(self) -> None:
        """A value is whole."""
        self._wants = "comma"
        self.done = not self._open

    def _begins(self, c: str) -> bool:
        """Outside of strings, numbers and words."""
        wants = self._wants
        if wants in ("comma", "value or ]", "key or }") and self._open and c == self._open[-1]:
            if wants != "comma" and (wants == "key or }") != (c == "}"):
                return False
            self._open.pop()
            self._ended()
            return True
        if wants == "colon":
            self._wants = "value"
            return c == ":"
        if wants == "comma":
            self._wants = "key" if self._open[-1] == "}" else "value"
            return c == ","
        if wants.startswith("key"):
            self._string, self._is_key = 1, True
            return c == '"'
        return self._value(c)

    def _value(self, c: str) -> bool:
        if c in CLOSES:
            self._open.append(CLOSES[c])
            self._wants = "key or }" if c == "{" else "value or ]"
        elif c == '"':
            self._string = 1
        elif c in WORDS:
            self._word = WORDS[c][1:]
        elif c in "-0123456789":
            self._number = c
        else:
            return False
        return len(self._open) <= 100
