"""DeepSeek, in both shapes: R1 and V3 write a call's kind, its name, and its arguments in a block of code;
V3.1 its name and its arguments."""

from __future__ import annotations

from collections.abc import Sequence

from outsize.serve.tools.base import CallFormat
from outsize.serve.tools.lark import Function, after_text, either, literal, word
from outsize.serve.tools.reading import (
    Reading,
    Source,
    arguments,
    blanks,
    closes,
    expect,
    skips,
    until,
)

CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
KIND, BLOCK, BLOCK_END = "function", "```json\n", "\n```"


def writes(template: str) -> bool:
    """Does a chat template speak of this format?"""
    return CALLS in template and SEP in template


class Format(CallFormat):
    name = "deepseek"
    show_tokens = (CALLS, CALLS_END, CALL, CALL_END, SEP)
    marks = (CALLS, CALL)

    @property
    def is_block(self) -> bool:
        """Is this the earlier shape?"""
        return BLOCK.strip() in self.template

    def example(self) -> str:
        head, end = (
            (f"{KIND}{SEP}FUNCTION\n{BLOCK}", BLOCK_END)
            if self.is_block
            else (f"FUNCTION{SEP}", "")
        )
        return f'{CALLS}{CALL}{head}{{"PARAMETER": "VALUE"}}{end}{CALL_END}{CALLS_END}'

    def rules(self, found: Sequence[Function], choice: str, several: bool) -> list[str]:
        begin, end, sep = (word(name, self.knows) for name in (CALL, CALL_END, SEP))
        calls = [f"{literal(f.name)} {sep} {f.rule}" for f in found]
        if self.is_block:
            heads = [f"{literal(KIND)} {sep} {literal(f'{f.name}{chr(10)}{BLOCK}')}" for f in found]
            ends = literal(BLOCK_END)
            calls = [f"{head} {f.rule} {ends}" for head, f in zip(heads, found, strict=True)]
        more = f" (/\\n?/ {begin} call {end})*" if several else ""
        rest = f"{begin} call {end}{more} {word(CALLS_END, self.knows)}"
        rules = after_text(CALLS, rest, choice, self.knows)
        return [*rules, f"call: {either(calls)}"]

    def read(self, source: Source) -> Reading[None]:
        """Calls, in either shape, and the closing mark, which may be missing."""
        yield from blanks(source)
        yield from skips(source, CALL)
        while True:
            name = (yield from until(source, SEP)).strip()
            if name == KIND and name not in source.names:
                name = (yield from until(source, "\n")).strip()
                yield from expect(source, BLOCK)
            yield source.checked(name)
            yield from blanks(source)
            yield from arguments(source)
            source.told = source.at
            yield from blanks(source)
            yield from closes(source, BLOCK_END[1:])
            yield from closes(source, CALL_END)
            yield from blanks(source)
            if not (yield from skips(source, CALL)):
                break
        yield from closes(source, CALLS_END)
