"""Prompts -> tokens, through the model's chat template where it has one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from outsize.decode.template import Messages, render
from outsize.decode.text import Tokens
from outsize.errors import OptionError, TemplateError
from outsize.pack.format import Pack

Prompt = str | Messages


def encode(
    pack: Pack, tokens: Tokens, prompts: Sequence[Prompt], system: str | None, raw: bool
) -> list[list[int]]:
    """Token ids of each prompt; a string is a text to continue where `raw` or the model is a base model.
    Raises OptionError, TemplateError."""
    template, name = pack.chat_template, pack.path.name
    if raw or (template is None and all(isinstance(p, str) for p in prompts)):
        if system is not None:
            raise OptionError(f"{name}: a system prompt needs a chat template")
        if not all(isinstance(p, str) for p in prompts):
            raise OptionError("raw takes prompts that are strings, not messages")
        return [tokens.encode(str(p), start=True) for p in prompts]
    if template is None:
        raise TemplateError(
            f"{name} has no chat template: it is a base model, which continues a text; "
            "give it a string to continue, as in `outsize run`"
        )
    chats = [_messages(p, system) for p in prompts]
    texts = render(template, chats, _special_names(pack, tokens))
    return [tokens.encode(text, start=True) for text in texts]


def _special_names(pack: Pack, tokens: Tokens) -> dict[str, str]:
    return {
        "bos_token": "" if pack.bos is None else tokens.piece(pack.bos),
        "eos_token": tokens.piece(pack.eos[0]) if pack.eos else "",
    }


def _messages(prompt: Prompt, system: str | None) -> Messages:
    said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    for message in said:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise OptionError(
                f"a message needs 'role' and 'content', this has neither: {message!r}"
            )
    return said if system is None else [{"role": "system", "content": system}, *said]
