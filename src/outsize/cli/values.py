"""Values of flags that are more than a word or a number."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from outsize.cli.console import text_of
from outsize.errors import OptionError
from outsize.home import expanded

WORDS = {"True": "true", "TRUE": "true", "False": "false", "FALSE": "false", "None": "null"}


def parse_arguments(given: Sequence[str]) -> dict[str, object] | None:
    """Variables for the chat template from KEY=VALUE texts; a value that is JSON, or True, False or None, is
    what it says. Raises OptionError."""
    made: dict[str, object] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise OptionError(f"--template-arg is {text!r}; KEY=VALUE is expected")
        try:
            made[key] = json.loads(WORDS.get(value, value))
        except (ValueError, RecursionError):
            made[key] = value
        if key.startswith("enable_") and not isinstance(made[key], bool):
            raise OptionError(f"--template-arg is {text!r}; {key} is true or false")
    return made or None


def parse_biases(given: Sequence[str]) -> dict[int, float] | None:
    """Biases by token id from ID=BIAS texts. Raises OptionError."""
    made: dict[int, float] = {}
    for text in given:
        id, _, bias = text.partition("=")
        try:
            made[int(id)] = float(bias)
        except ValueError:
            raise OptionError(
                f"--logit-bias is {text!r}; ID=BIAS, two numbers, is expected"
            ) from None
    return made or None


def parse_schema(given: str | None) -> Mapping[str, object] | None:
    """A JSON schema from its text, or from a file of it. Raises OptionError."""
    if given is None:
        return None
    is_text = given.lstrip().startswith(("{", "true"))
    text = text_of(given) if is_text else _read("--schema", given)
    try:
        return cast("Mapping[str, object]", json.loads(text))  # what it is, Options checks
    except RecursionError:
        raise OptionError("--schema is nested too deeply") from None
    except ValueError as e:
        where = "" if is_text else f" {given}"
        raise OptionError(f"--schema{where} is not JSON: {e}") from None


def parse_grammar(given: str | None) -> str | None:
    """A Lark grammar from a file. Raises OptionError."""
    return None if given is None else _read("--grammar", given)


def _read(flag: str, name: str) -> str:
    """The text of a file. Raises OptionError."""
    try:
        return expanded(Path(name)).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as e:
        why = e.strerror if isinstance(e, OSError) else e
        raise OptionError(f"{flag} {name!r} cannot be read: {why}") from None
