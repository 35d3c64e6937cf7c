"""Refuses prompts that are far too long before all of them is tokenized, which takes seconds and memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from outsize.errors import ContextError
from outsize.text.template import Messages
from outsize.text.tokens import Tokens

OFTEN = 16  # characters a token at most, in texts that are no rows of spaces
SLACK = 256  # tokens that a cut, and names of control tokens in a text, may account for


def check_size(prompt: str | Messages, tokens: Tokens, context: int) -> None:
    """Raise ContextError for a prompt whose beginning alone has more tokens than the context."""
    texts = [prompt] if isinstance(prompt, str) else [t for m in prompt for t in _texts(m)]
    size, most = sum(map(len, texts)), OFTEN * context
    if size <= most:
        return
    start = "".join(texts)[:most]
    if len(tokens.encode(start)) > context + SLACK:
        raise ContextError(
            f"the prompt has {size:,} characters, and the first {most:,} of them alone are more tokens than "
            f"the {context:,} that the context holds; shorten it, or raise --context"
        )


def _texts(message: object) -> Iterator[str]:
    """What a message says, as far as it is text."""
    if not isinstance(message, Mapping):
        return
    content = message.get("content")
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text") if isinstance(part, Mapping) else part
        if isinstance(text, str):
            yield text
