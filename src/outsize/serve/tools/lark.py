"""Pieces of the grammars of calls: which tools may be called, and what arguments obey.

Arguments obey the tool's `parameters`, and have no other properties than those, unless it says so. Of a tool
that is not `strict` a schema is taken as far as it can be followed; of a strict one, wholly or not at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from outsize.errors import OptionError
from outsize.serve.ask import AUTO, REQUIRED, Tool
from outsize.text.grammar import schema_problem
from outsize.text.grammar_source import schema_text, special_name

Knows = Callable[[str], bool]  # is this a token of the model's that marks a part of a reply?
NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
TEXT = "TEXT: /(.|\\n)*/"
LENIENT = {"lenient": True, "coerce_one_of": True}
SMALL = 8_000  # characters
ANY: Mapping[str, object] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class Function:
    """A tool that may be called: its name, and a Lark rule's name and text for its arguments."""

    name: str
    rule: str
    arguments: str


def names_of(tools: Sequence[Tool]) -> list[str]:
    """Raises OptionError."""
    return [_function(tool)[0] for tool in tools]


def functions(tools: Sequence[Tool], choice: str) -> list[Function]:
    """Those that may be called under a `tool_choice`. Raises OptionError."""
    _check_all(tools)
    found = [
        Function(
            name, f"arguments_{i}", f"arguments_{i}: %json {_schema(name, parameters, strict)}"
        )
        for i, (name, parameters, strict) in enumerate(map(_function, tools))
        if choice in (AUTO, REQUIRED) or choice == f"={name}"
    ]
    if not found:
        raise OptionError(f"tool_choice names {choice[1:]!r}, and there is no such tool")
    return found


def _check_all(tools: Sequence[Tool]) -> None:
    """Raise OptionError for tools whose schemas take long, one after the other."""
    schema_text({"all": [_function(tool)[1] for tool in tools]}, "tools' schemas")


def _function(tool: Tool) -> tuple[str, Mapping[str, object], bool]:
    """Name, parameters, strict. Raises OptionError."""
    function = tool.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str):
        raise OptionError(f"a tool has no function with a name: {str(tool)[:200]}")
    if NAME.fullmatch(name) is None:
        raise OptionError(
            f"a tool's name is {name[:80]!r}; up to 128 letters, digits and _ . : / - are expected"
        )
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise OptionError(
            f"parameters of the tool {name} are no JSON schema: {str(parameters)[:200]}"
        )
    return name, parameters or ANY, function.get("strict") is True


def _schema(name: str, parameters: Mapping[str, object], strict: bool) -> str:
    """Of a tool's arguments, as JSON that llguidance can follow. Raises OptionError."""
    what = f"schema of the tool {name}"
    closed = {"type": "object", **parameters}
    if "properties" in closed and not closed.keys() & {"additionalProperties", "patternProperties"}:
        closed["additionalProperties"] = False
    exact = schema_text(closed, what)
    if not (problem := _problem(exact)):
        return exact
    if strict:
        raise OptionError(f"the {what} cannot be used: {problem}")
    loose = schema_text(closed, what, LENIENT)
    return loose if not _problem(loose) else schema_text(ANY, what)


def _problem(text: str) -> str:
    """What is wrong with a schema; that of small ones is remembered: programs send them again and again."""
    return _known_problem(text) if len(text) < SMALL else schema_problem(text)


_known_problem = lru_cache(128)(schema_problem)


def word(name: str, knows: Knows) -> str:
    """A mark as a token of its own, or, where the model has none, as text."""
    return special_name(name) if knows(name) else json.dumps(name, ensure_ascii=False)


def either(rules: Sequence[str]) -> str:
    return "(" + " | ".join(rules) + ")"


def literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def after_text(name: str, rest: str, choice: str, knows: Knows) -> list[str]:
    """Rules of a reply that is calls, or, where the model may choose, a text that they may follow. A call
    begins with the mark `name`, after which `rest` comes."""
    if choice != AUTO:
        return [f"start: {word(name, knows)} {rest}"]
    if knows(name):
        return [f"start: TEXT ({word(name, knows)} {rest})?", TEXT]
    lazy = f"begun[lazy]: /(.|\\n)*{re.escape(name).replace('/', chr(92) + '/')}/"
    return [f"start: TEXT | begun {rest}", lazy, TEXT]
