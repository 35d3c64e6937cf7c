"""The command line. Imports of anything heavy happen inside the commands: --help must be instant."""

# ruff: noqa: I001
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from outsize.version import __version__
from outsize.cli import adapt, bench, console, settings
from outsize.cli.flags import (
    AdapterFlag, AsJson, Context, DraftFlag, Encoding, ExpertsFlag, Force, MaxTokens, Memory,
    MinP, ModelFlag, Native, Overflow, Penalty, Quiet, Raw, Seed, ShowThinking, Special, Stop,
    System, Temperature, TemplateArgs, Threads, TopK, TopP, Verbose, Verify, option, told,
)  # fmt: skip
from outsize.errors import OptionError
from outsize.options import DEFAULT_MODEL, Options, parse_arguments
from outsize.home import home

app = typer.Typer(
    cls=console.Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run language models that outsize the memory you have, and get answers fast.",
)
app.add_typer(bench.app, name="bench")
app.add_typer(adapt.app, name="adapt")
DEFAULT = Options()


@app.command()
def run(
    ctx: typer.Context,
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL] [PROMPT]", help="- reads standard input.")
    ] = None,
    model: ModelFlag = None,
    max_tokens: MaxTokens = DEFAULT.max_tokens,
    context: Context = None,
    threads: Threads = None,
    temperature: Temperature = DEFAULT.temperature,
    top_k: TopK = DEFAULT.top_k,
    top_p: TopP = DEFAULT.top_p,
    min_p: MinP = DEFAULT.min_p,
    repeat_penalty: Penalty = DEFAULT.repeat_penalty,
    seed: Seed = None,
    stop: Stop = None,
    system: System = None,
    raw: Raw = False,
    special: Special = False,
    template_arg: TemplateArgs = None,
    show_thinking: ShowThinking = None,
    overflow: Overflow = "error",
    memory: Memory = "auto",
    experts: ExpertsFlag = None,
    draft: DraftFlag = "auto",
    adapter: AdapterFlag = None,
    verify: Verify = "first",
    force: Force = False,
    encoding: Encoding = "auto",
    native: Native = True,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Answer one prompt. One argument is the prompt, unless it names a model: that opens a chat."""
    from outsize.cli import chat
    from outsize.cli import run as terminal

    options = Options(
        max_tokens, temperature, top_k, top_p, min_p, repeat_penalty, seed, tuple(stop or ()),
        system, raw, terminal.first_adapter(adapter), special, parse_arguments(template_arg or ()),
    )  # fmt: skip
    given = told(ctx)
    options = terminal.readable(options, given)
    load_options = terminal.load_options_of(
        given, memory, context, encoding, verify, force, native, quiet, experts, draft
    )
    how = terminal.DisplayOptions(
        load_options, threads, as_json, verbose, tuple(adapter or ()), show_thinking, overflow
    )
    name, prompt = terminal.understand(arguments or [], model)
    terminal.check_use(given, how, prompt is not None)
    if prompt is None:
        chat.chat(name, options, how)
    else:
        terminal.answer(name, prompt, options, how)


@app.command()
def chat(
    ctx: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[MODEL]")] = None,
    model: ModelFlag = None,
    max_tokens: MaxTokens = DEFAULT.max_tokens,
    context: Context = None,
    threads: Threads = None,
    temperature: Temperature = DEFAULT.temperature,
    top_k: TopK = DEFAULT.top_k,
    top_p: TopP = DEFAULT.top_p,
    min_p: MinP = DEFAULT.min_p,
    repeat_penalty: Penalty = DEFAULT.repeat_penalty,
    seed: Seed = None,
    stop: Stop = None,
    system: System = None,
    template_arg: TemplateArgs = None,
    show_thinking: ShowThinking = None,
    overflow: Overflow = "error",
    memory: Memory = "auto",
    experts: ExpertsFlag = None,
    draft: DraftFlag = "auto",
    adapter: AdapterFlag = None,
    verify: Verify = "first",
    force: Force = False,
    encoding: Encoding = "auto",
    native: Native = True,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Talk. /reset forgets, /system TEXT begins anew under it, /stats counts, /bye leaves."""
    from outsize.cli import chat
    from outsize.cli import run as terminal

    if model is not None and name is not None:
        raise OptionError(f"two models are given, {name} and -m {model}; give one")
    options = Options(
        max_tokens, temperature, top_k, top_p, min_p, repeat_penalty, seed, tuple(stop or ()),
        system, False, terminal.first_adapter(adapter), False, parse_arguments(template_arg or ()),
    )  # fmt: skip
    options = terminal.readable(options, told(ctx))
    load_options = terminal.load_options_of(
        told(ctx), memory, context, encoding, verify, force, native, quiet, experts, draft
    )
    how = terminal.DisplayOptions(
        load_options, threads, False, verbose, tuple(adapter or ()), show_thinking, overflow
    )
    chat.chat(model or name or DEFAULT_MODEL, options, how)


@app.command()
def plan(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument()] = DEFAULT_MODEL,
    memory: Memory = "auto",
    experts: ExpertsFlag = None,
    draft: DraftFlag = "auto",
    adapter: AdapterFlag = None,
    context: Context = None,
    prompt_tokens: Annotated[
        int | None, option("--prompt-tokens", text="Predict the first token after so many (512).")
    ] = None,
    threads: Threads = None,
    force: Force = False,
    encoding: Encoding = "auto",
    native: Native = True,
    as_json: AsJson = False,
    html: Annotated[Path | None, option("--html", text="Write a page with the curve.")] = None,
    trace: Annotated[
        Path | None, option("--trace", text="Expect of experts what this recording tells.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """What will be where and how fast it will be, from headers alone: before any download."""
    from outsize.cli import plan
    from outsize.cli import run as terminal
    from outsize.engine import load as loading

    loading.set_threads(threads)
    adapters = dict(terminal.named_adapters(adapter or ()))
    load_options = terminal.load_options_of(
        told(ctx),
        memory,
        context,
        encoding,
        "first",
        force,
        native,
        quiet,
        experts,
        draft,
        adapters,
    )
    plan.show(model, load_options, prompt_tokens, as_json, html, trace)


@app.command()
def trace(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument()],
    prompts: Annotated[Path, option("--prompts", text="A prompt a line (or JSON with `prompt`).")],
    output: Annotated[Path, option("-o", "--output", text="The trace, as CSV.")],
    max_tokens: MaxTokens = 64,
    context: Context = None,
    threads: Threads = None,
    memory: Memory = "auto",
    experts: ExpertsFlag = None,
    raw: Raw = False,
    quiet: Quiet = False,
) -> None:
    """Record which experts a model uses on your own prompts, for `outsize bench cache`."""
    from outsize.cli import run as terminal
    from outsize.cli import trace

    how = memory, context, "auto", "first", False, True, quiet, experts, "none"
    load_options = terminal.load_options_of(told(ctx), *how)
    trace.record(model, load_options, threads, prompts, output, max_tokens, raw)


@app.command()
def pack(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument()] = DEFAULT_MODEL,
    encoding: Encoding = "auto",
    refresh: Annotated[
        bool, option("--refresh", text="Ask the hub for a newer revision of a model packed before.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Fetch and convert a model, so that it starts at once."""
    from outsize.cli import run as terminal
    from outsize.pack import fetch
    from outsize.plan import decide

    load_options = terminal.load_options_of(told(ctx), "auto", None, encoding)
    load_options = decide.for_model(load_options, model)
    made = fetch.pack(model, encoding=load_options.encoding, quiet=quiet, refresh=refresh)
    terminal.show_packs([made], as_json)


@app.command(name="list")
def list_packs(as_json: AsJson = False) -> None:
    """The packs on this machine."""
    from outsize.cli import run as terminal
    from outsize.pack import leftovers, store

    folder = home() / "packs"
    terminal.show_packs(list(store.packs(folder)), as_json)
    terminal.note_leftovers(leftovers.leftovers(folder))


@app.command()
def rm(names: Annotated[list[str], typer.Argument(metavar="NAME...")]) -> None:
    """Remove packs, by the names that `outsize list` shows."""
    from outsize.pack import store

    for name in names:
        size = store.remove(home() / "packs", name)
        print(f"removed {name} ({size / 1e6:,.0f} MB)")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What this machine is, what it can do, and what would run slowly here and why."""
    from outsize.report import doctor as doctors

    doctors.show(as_json)


@app.command()
def version() -> None:
    """The version."""
    print(f"outsize {__version__}")


def main() -> None:
    """Run a command; print an error as one sentence."""
    settings.end_by_exception()
    console.run(_run, settings.no_color)


def _run() -> None:
    settings.check_environment(app)
    app(default_map=settings.default_map(app))


if __name__ == "__main__":
    main()
