"""Mistral, in both shapes: `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, and, since 2025,
`[TOOL_CALLS]name[ARGS]{...}` for each call, perhaps with `[CALL_ID]id` after the name."""

from __future__ import annotations

from collections.abc import Sequence

from outsize.serve.tools.base import CallFormat
from outsize.serve.tools.lark import Function, after_text, either, literal, word
from outsize.serve.tools.reading import (
    Reading,
    Source,
    arguments,
    blanks,
    call_object,
    expect,
    skips,
    until,
)

CALLS, ARGS, ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
ANY_ID = "/[A-Za-z0-9]{9}/"


def writes(template: str) -> bool:
    """Does a chat template speak of this format?"""
    return CALLS in template


class Format(CallFormat):
    name = "mistral"
    show_tokens = (CALLS, ARGS, ID)

    @property
    def is_list(self) -> bool:
        """Is this the earlier shape?"""
        return ARGS not in self.template

    def example(self) -> str:
        call = '[{"name": "FUNCTION", "arguments": {"PARAMETER": "VALUE"}}]'
        return CALLS + (call if self.is_list else f'FUNCTION{ARGS}{{"PARAMETER": "VALUE"}}')

    def rules(self, found: Sequence[Function], choice: str, several: bool) -> list[str]:
        between = '", "' if self.is_list else word(CALLS, self.knows)
        rest = f"call ({between} call)*" if several else "call"
        rest = f'"[" {rest} "]"' if self.is_list else rest
        rules = after_text(CALLS, rest, choice, self.knows)
        calls = f"call: {either([self._call(f) for f in found])}"
        return [*rules, calls]

    def _call(self, f: Function) -> str:
        if self.is_list:
            head, id = literal(f'{{"name": "{f.name}", "arguments": '), literal(', "id": "')
            return f'{head} {f.rule} ({id} {ANY_ID} "\\"")? "}}"'
        id = f"({word(ID, self.knows)} {ANY_ID})? " if self.knows(ID) else ""
        return f"{literal(f.name)} {id}{word(ARGS, self.knows)} {f.rule}"

    def read(self, source: Source) -> Reading[None]:
        """A list of calls, or the name of one and its arguments."""
        yield from blanks(source)
        if not (yield from skips(source, "[")):
            yield source.checked((yield from until(source, ARGS)).split(ID)[0].strip())
            yield from blanks(source)
            yield from arguments(source)
            return
        while True:
            yield from blanks(source)
            yield from call_object(source)
            source.told = source.at
            yield from blanks(source)
            if not (yield from skips(source, ",")):
                break
        yield from expect(source, "]")
