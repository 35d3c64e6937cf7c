"""Hermes, Qwen 2.5 and 3, and many more: `<tool_call>`, a line of JSON, `</tool_call>`, for each call."""

from __future__ import annotations

from collections.abc import Sequence

from outsize.serve.tools.base import CallFormat
from outsize.serve.tools.lark import Function, after_text, either, literal, word
from outsize.serve.tools.reading import (
    FENCE,
    Reading,
    Source,
    bare_call,
    blanks,
    call_object,
    closes,
)

OPEN, CLOSE = "<tool_call>", "</tool_call>"
OTHERS = ("<function=", "<arg_key>")  # of formats that use the same marks


def writes(template: str) -> bool:
    """Does a chat template speak of this format?"""
    return OPEN in template and not any(other in template for other in OTHERS)


class Format(CallFormat):
    name = "hermes"
    show_tokens = (OPEN, CLOSE)
    bare = ("{", FENCE)  # small models forget the marks

    def example(self) -> str:
        call = '{"name": "FUNCTION", "arguments": {"PARAMETER": "VALUE"}}'
        return f"{OPEN}\n{call}\n{CLOSE}"

    def rules(self, found: Sequence[Function], choice: str, several: bool) -> list[str]:
        begin, end = word(OPEN, self.knows), word(CLOSE, self.knows)
        heads = [literal(f'\n{{"name": "{f.name}", "arguments": ') for f in found]
        calls = [f'{head} {f.rule} "}}\\n"' for head, f in zip(heads, found, strict=True)]
        more = f' ("\\n" {begin} call {end})*' if several else ""
        rules = after_text(OPEN, f"call {end}{more}", choice, self.knows)
        return [*rules, f"call: {either(calls)}"]

    def read(self, source: Source) -> Reading[None]:
        """A call, and the closing mark, which may be missing."""
        if not source.at:
            yield from bare_call(source)
            return
        yield from blanks(source)
        yield from call_object(source)
        source.told = source.at
        yield from blanks(source)
        yield from closes(source, CLOSE)
