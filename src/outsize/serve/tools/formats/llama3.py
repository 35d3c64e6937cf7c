"""Llama 3.1 to 3.3: a reply that is a JSON object `{"name": ..., "parameters": {...}}`, perhaps after
`<|python_tag|>`; one call a reply, which is all that their templates take back."""

from __future__ import annotations

from collections.abc import Sequence

from outsize.serve.ask import AUTO
from outsize.serve.tools.base import CallFormat
from outsize.serve.tools.lark import Function, either, literal, word
from outsize.serve.tools.reading import Reading, Source, bare_call, blanks, call_object

TAG = "<|python_tag|>"


def writes(template: str) -> bool:
    """Does a chat template speak of this format?"""
    return all(part in template for part in ("<|start_header_id|>", '"parameters": ', "ipython"))


class Format(CallFormat):
    name = "llama3"
    show_tokens = (TAG,)
    bare = ("{",)

    def example(self) -> str:
        return '{"name": "FUNCTION", "parameters": {"PARAMETER": "VALUE"}}'

    def rules(self, found: Sequence[Function], choice: str, several: bool) -> list[str]:
        heads = [literal(f'{{"name": "{f.name}", "parameters": ') for f in found]
        calls = [f'{head} {f.rule} "}}"' for head, f in zip(heads, found, strict=True)]
        tag = f"{word(TAG, self.knows)}? " if self.knows(TAG) else ""
        text = " | TEXT\nTEXT: /([^{](.|\\n)*)?/" if choice == AUTO else ""
        return [f"start: {tag}call{text}", f"call: {either(calls)}"]

    def read(self, source: Source) -> Reading[None]:
        yield from blanks(source)
        yield from (call_object(source) if source.at else bare_call(source))
