"""gpt-oss (harmony): a message to a function in the commentary channel, which ends the reply: one call each.

A reply's text shows its header in one form, whatever order the model wrote it in (`text/channels.py: CALL`).
https://developers.openai.com/cookbook/articles/openai-harmony
"""

from __future__ import annotations

from collections.abc import Sequence

from outsize.serve.ask import AUTO
from outsize.serve.tools.base import CallFormat
from outsize.serve.tools.lark import TEXT, Function, either, literal
from outsize.serve.tools.reading import Reading, Source, arguments, blanks, until
from outsize.text.channels import CALL, HARMONY

MARK, MESSAGE = CALL.split("{}")
SPACE = "functions."
AGAIN = '<|end|> <|start|> "assistant"'


def writes(template: str) -> bool:
    """Does a chat template speak of this format?"""
    return HARMONY[1] in template and HARMONY[2] in template


class Format(CallFormat):
    name = "harmony"
    show_tokens = (HARMONY[1],)
    marks = (MARK,)

    def example(self) -> str:
        return CALL.format(f"{SPACE}FUNCTION") + '{"PARAMETER": "VALUE"}'

    def rules(self, found: Sequence[Function], choice: str, several: bool) -> list[str]:
        """Of a whole reply, with what the model thinks; it begins within a header."""
        calls = [f"{self._header(f.name)} <|message|> {f.rule}" for f in found]
        said = f'<|channel|> ("analysis" | "commentary") <|message|> TEXT {AGAIN}'
        answer = ' | <|channel|> "final" <|message|> TEXT' if choice == AUTO else ""
        return [
            f"start: ({said})* (call{answer})",
            f"call: {either(calls)}",
            'json: / ?/ <|constrain|> "json" | " json" | / ?/',
            TEXT,
        ]

    def _header(self, name: str) -> str:
        """In both orders."""
        channel, to = "commentary", f" to={SPACE}{name}"
        both = f"<|channel|> {literal(channel + to)} | {literal(to)} <|channel|> {literal(channel)}"
        return f"({both}) json"

    def read(self, source: Source) -> Reading[None]:
        """The recipient, and its arguments."""
        recipient = yield from until(source, MESSAGE)
        yield source.checked(recipient.removeprefix(SPACE))
        yield from blanks(source)
        yield from arguments(source)
