"""`outsize run`: answer one prompt."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Annotated

import typer

from outsize.checkpoint.spec import holds_model, names_model
from outsize.cli import console
from outsize.cli.command import with_flags, without
from outsize.cli.flags import MODEL, DisplayOptions
from outsize.errors import OptionError
from outsize.options import DEFAULT_MODEL, LoadOptions, Options

CHAT_ONLY, PROMPT_ONLY = ("overflow",), ("raw", "special", "json", "logprobs")  # flags


@with_flags
def run(
    request: Options,
    display: DisplayOptions,
    load: Annotated[LoadOptions, without("streams", "chunk")],
    given: frozenset[str],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL] [PROMPT]", help="- reads standard input.")
    ] = None,
    model: Annotated[str | None, MODEL] = None,
) -> None:
    """Answer one prompt. One argument is the prompt, unless it names a model: that opens a chat."""
    from outsize.cli import session, talk

    name, prompt = understand(arguments or [], model)
    check_use(given, load, display, prompt is not None)
    load = replace(load, grammars=request.schema is not None or request.grammar is not None)
    if prompt is None:
        talk.chat(name, load, request, display)
        return
    if load.prefix_cache in (None, "memory"):  # of no use to one prompt
        load = replace(load, prefix_cache="off")
    session.answer(name, prompt, load, request, display)


def understand(arguments: Sequence[str], model: str | None) -> tuple[str, str | None]:
    """[MODEL] [PROMPT] -> a model and a prompt; no prompt means a chat. Raises OptionError."""
    words = list(arguments)
    if model is None and words and (len(words) == 2 or names_model(words[0])):
        if len(words) == 1 and not holds_model(words[0]):
            raise OptionError(
                f"{words[0]!r} is there, and no model; if it is a prompt, name a model before it or after -m"
            )
        model = words.pop(0)
    if len(words) > 1:
        raise OptionError(
            f"{len(words)} prompts given, one is expected; put the prompt in quotes, and the model "
            "before it or after -m"
        )
    prompt = words[0] if words else None
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        prompt = console.text_of(sys.stdin.read(), sys.stdin.encoding)
        if not prompt.strip():
            raise OptionError(
                "standard input holds no prompt; give one, in quotes or through a pipe"
            )
    if prompt is not None and not prompt.strip():
        raise OptionError("the prompt is blank; give one in quotes, or none for a chat")
    return model or DEFAULT_MODEL, None if prompt is None else console.text_of(prompt)


def check_use(
    given: Collection[str], load: LoadOptions, display: DisplayOptions, prompt: bool
) -> None:
    """Is each flag that was given of use for a prompt, or for a chat? Raises OptionError."""
    for name in CHAT_ONLY if prompt else PROMPT_ONLY:
        if name in given:
            other = "a chat" if prompt else "a prompt"
            raise OptionError(f"--{name} is for {other}; leave it out, or give {other}")
    if "adapter" in given and prompt and len(load.adapters) > 1:
        raise OptionError(
            f"--adapter is given {len(load.adapters)} times, and one prompt is answered with one; give one"
        )
    if "prefix_cache" in given and prompt and load.prefix_cache == "memory":
        raise OptionError(
            "--prefix-cache memory is forgotten with this one prompt; give disk, which other runs find again"
        )
    if "logprobs" in given and prompt and not display.json:
        raise OptionError("--logprobs is part of what --json prints; add --json")
    if "show_thinking" in given and display.json and display.show_thinking is False:
        raise OptionError(
            "--json tells what the model thought, under `reasoning`; leave --hide-thinking out"
        )
