"""Messages for a person, on stderr; `silent` and `warn_once` for callers who choose."""

from __future__ import annotations

import sys
from functools import cache


def say(text: str) -> None:
    """Print to stderr, where there is one."""
    if sys.stderr is not None:  # print would take stdout in its place
        print(text, file=sys.stderr)


def silent(text: str) -> None:
    """Say nothing."""


@cache
def warn_once(text: str) -> None:
    """Warn, but of the same only once in this process."""
    warn(text)


def warn(text: str) -> None:
    say(f"warning: {text}")
