"""`outsize serve`: a model that other programs can ask."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated

import typer

from outsize.cli.command import only, with_flags
from outsize.cli.flags import MODEL, DisplayOptions, Flag, Texts
from outsize.errors import OptionError
from outsize.log import say
from outsize.options import DEFAULT_MODEL, LoadOptions
from outsize.serve.options import ServeOptions


def _all(given: list[str] | None) -> tuple[str, ...]:
    return tuple(given or ())


SEVERAL = LoadOptions(
    streams=8, grammars=True
)  # beyond eight, a step's rows cost as much as a step of their own


@dataclass(frozen=True, slots=True)
class ServeFlags:
    """Where to listen, who may ask, and how it ends: the fields of `ServeOptions`."""

    host: Annotated[
        str, Flag("--host", "Address to listen at; one that other machines reach needs a key.")
    ] = "127.0.0.1"
    port: Annotated[int, Flag("-p --port", "Port to listen at; 0: any that is free.")] = 8080
    api_key: Annotated[str | None, Flag("--api-key", "Key that clients must send.")] = None
    alias: Annotated[
        tuple[str, ...],
        Flag("--alias", "A further name of the model (repeatable); '*': any.", Texts, _all, "NAME"),
    ] = ()
    max_queue: Annotated[int, Flag("--max-queue", "Requests that may wait.")] = 64
    idle_unload: Annotated[
        float | None, Flag("--idle-unload", "Minutes without a request that close the model.")
    ] = None
    cors: Annotated[
        tuple[str, ...],
        Flag("--cors", "Origin of web pages that may ask (repeatable).", Texts, _all, "ORIGIN"),
    ] = ()
    lenient: Annotated[
        bool, Flag("--lenient", "Report unknown fields in a header; do not refuse them.")
    ] = False
    grace: Annotated[float, Flag("--grace", "Seconds for replies to end in, at the end.")] = 30.0
    json_log: Annotated[bool, Flag("--json-log", "Log in JSON, a line a request.")] = False


@with_flags
def serve(
    own: ServeFlags,
    display: Annotated[DisplayOptions, only("verbose")],
    load: LoadOptions = SEVERAL,
    name: Annotated[str | None, typer.Argument(metavar="[MODEL]")] = None,
    model: Annotated[str | None, MODEL] = None,
) -> None:
    """Serve a model to other programs, as OpenAI, Anthropic and Ollama do. Ctrl-C ends it."""
    from outsize.cli import session
    from outsize.serve import server
    from outsize.serve.host import Host

    if model is not None and name is not None:
        raise OptionError(f"two models are given, {name} and -m {model}; give one")
    source = model or name or DEFAULT_MODEL
    options = ServeOptions(**asdict(own))
    bound = server.bind(options)
    host = Host(source, partial(session.open_model, source, load, display), options, load.adapters)
    if not load.quiet:
        url = server.url(bound)
        say(
            f"{url} is a page to chat; programs ask {url}/v1 (OpenAI), or {url} (Anthropic, Ollama)"
        )
        host.on_ready = lambda: say(f"{host.name} is ready")
    server.run(host, bound)
