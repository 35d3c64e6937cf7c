"""Prompts -> tokens, through the model's chat template where it has one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from outsize.arguments import wrong
from outsize.errors import OptionError, TemplateError
from outsize.options import Options
from outsize.pack.format import Pack
from outsize.text.template import Message, Messages, render
from outsize.text.tokens import Tokens

Prompt = str | Messages
NAME = "chat_template"  # the template argument that names one of several templates
REASONING = ("reasoning_content", "thinking", "reasoning")
OWN = ("messages", "add_generation_prompt")  # variables that are not a caller's to set


def encode(
    pack: Pack, tokens: Tokens, prompts: Sequence[Prompt], options: Options
) -> list[list[int]]:
    """Token ids of each prompt; a string is a text to continue where `raw` or the model is a base model.
    The names of control tokens in messages are text; in a raw prompt, unless `special`. Raises OptionError,
    TemplateError."""
    for prompt in prompts:
        if not isinstance(prompt, str | list | tuple):
            raise wrong("a prompt", prompt, "a string, or a list of messages")
    texts_only = all(isinstance(p, str) for p in prompts)
    if options.continue_final:
        _check_unfinished(prompts, options)
    if options.raw or (not pack.chat_templates and texts_only):
        return _continued(pack, tokens, prompts, options)
    if options.special:
        raise OptionError("special tokens are read in raw prompts alone; add --raw, or raw=True")
    if not pack.chat_templates:
        raise TemplateError(
            f"{pack.path.name} has no chat template: it is a base model, which continues a text; "
            "give it a string to continue, as in `outsize run`"
        )
    arguments = dict(options.template_args or {})
    template = choose(pack, arguments)
    chats = [[_marked(m, tokens) for m in _messages(p, options.system)] for p in prompts]
    names = {**pack.special_tokens, **_marked(arguments, tokens)}
    texts = render(template, chats, names, options.continue_final)
    return [tokens.encode_marked(text) for text in texts]


def _check_unfinished(prompts: Sequence[Prompt], options: Options) -> None:
    """Raise OptionError unless each chat ends with a text of the assistant's, for the reply to go on with."""
    if options.schema is not None or options.grammar is not None:
        raise OptionError(
            "continue_final goes on with a text that has begun, and a schema or grammar (of tools, too) is "
            "of a whole one; give one of them"
        )
    for prompt in prompts:
        last = {} if isinstance(prompt, str) or not prompt else prompt[-1]
        said, calls = last.get("content"), last.get("tool_calls")
        if last.get("role") != "assistant" or not isinstance(said, str) or not said or calls:
            raise OptionError(
                "continue_final goes on with the last message, which must be the assistant's and have a text"
            )


def _marked(value: Message, tokens: Tokens) -> Message:
    """A message, or template arguments, with what people typed marked."""
    marks = tokens.answer_marks if value.get("role") == "assistant" else tokens.marks
    try:
        return cast("Message", marks.mark(value))
    except RecursionError:
        raise OptionError("messages and template arguments are nested too deeply") from None


def _continued(
    pack: Pack, tokens: Tokens, prompts: Sequence[Prompt], options: Options
) -> list[list[int]]:
    """Texts to continue."""
    if options.system is not None or options.template_args:
        what = "a system prompt needs" if options.system is not None else "template arguments need"
        raise OptionError(f"{pack.path.name}: {what} a chat template")
    if not all(isinstance(p, str) for p in prompts):
        raise OptionError("raw takes prompts that are strings, not messages")
    return [tokens.encode(str(p), start=True, special=options.special) for p in prompts]


def choose(pack: Pack, arguments: dict[str, object]) -> str:
    """The template to use: the one named, or the one for what the arguments hold, or the default. Takes its
    name out of `arguments`. Raises OptionError."""
    for name in OWN:
        if name in arguments:
            raise OptionError(f"template argument {name!r} is set by outsize; leave it out")
    known, asked = pack.chat_templates, arguments.pop(NAME, None)
    if asked is not None and not isinstance(asked, str):
        raise OptionError(f"template argument {NAME} is {asked!r}; a template's name is expected")
    wanted = [asked] if asked is not None else []
    if asked is None:
        wanted += ["tool_use"] if arguments.get("tools") else []
        wanted += ["rag"] if arguments.get("documents") else []
        wanted += ["default", *(known if len(known) == 1 else ())]
    found = next((known[name] for name in wanted if name in known), None)
    if found is None:
        what = "no default chat template" if asked is None else f"no chat template {asked!r}"
        raise OptionError(
            f"{pack.path.name} has {what}; it has {', '.join(sorted(known))}: name one with "
            f"--template-arg {NAME}=NAME, or template_args={{{NAME!r}: ...}}"
        )
    return found


def _messages(prompt: Prompt, system: str | None) -> list[Message]:
    only: Message = {"role": "user", "content": prompt}
    said = [only] if isinstance(prompt, str) else list(prompt)
    for message in said:
        _check(message)
    said = [_with_reasoning(message) for message in said]
    return said if system is None else [{"role": "system", "content": system}, *said]


def _with_reasoning(message: Message) -> Message:
    """What a message was reasoned from, under each of the names that templates know it by."""
    found = next((message[k] for k in REASONING if message.get(k) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def _check(message: object) -> None:
    """Raises OptionError for what no template could take."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise OptionError(f"a message needs a 'role', this has none: {str(message)[:200]}")
    _check_calls(message.get("tool_calls"))
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise OptionError(
                    f"a message has a part of type {kind!r}; outsize reads parts "
                    '{"type": "text", "text": ...} alone'
                )
    elif content is not None and not isinstance(content, str):
        raise OptionError(
            f"a message's content is {str(content)[:200]!r}; text, or a list of parts, is expected"
        )


def _check_calls(calls: object) -> None:
    """Raises OptionError for calls of tools that no template could take."""
    if calls is not None and not isinstance(calls, list | tuple):
        raise OptionError(f"a message's tool_calls are {str(calls)[:200]!r}; a list is expected")
    for call in calls or ():
        function = call.get("function") if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str):
            raise OptionError(
                f"a message has a tool call {str(call)[:200]!r}; one like "
                '{"function": {"name": ..., "arguments": ...}} is expected'
            )
