"""`outsize chat`: a conversation at the terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from outsize.cli.command import with_flags, without
from outsize.cli.flags import MODEL, DisplayOptions
from outsize.errors import OptionError
from outsize.options import DEFAULT_MODEL, LoadOptions, Options


@with_flags
def chat(
    request: Annotated[Options, without("raw", "special", "logprobs")],
    display: Annotated[DisplayOptions, without("json")],
    load: Annotated[LoadOptions, without("streams", "chunk")],
    name: Annotated[str | None, typer.Argument(metavar="[MODEL]")] = None,
    model: Annotated[str | None, MODEL] = None,
) -> None:
    """Talk. /reset forgets, /system TEXT begins anew under it, /stats counts, /bye leaves."""
    from outsize.cli import talk

    if model is not None and name is not None:
        raise OptionError(f"two models are given, {name} and -m {model}; give one")
    talk.chat(model or name or DEFAULT_MODEL, load, request, display)
