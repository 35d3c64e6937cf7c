"""The command line. Imports of anything heavy happen inside the commands: --help must be instant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from outsize import __version__, settings
from outsize.errors import OutsizeError
from outsize.options import DEFAULT_MODEL, Options

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run language models that outsize the memory you have, and get answers fast.",
)
bench = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Measure: speed, quality.")
app.add_typer(bench, name="bench")
DEFAULT = Options()


def _option(*names: str, text: str, metavar: str | None = None) -> Any:
    """A flag with its twin in the environment."""
    long = next(n for n in names if n.startswith("--")).split("/")[0]
    env = "OUTSIZE_" + long[2:].upper().replace("-", "_")
    return typer.Option(*names, help=text, envvar=env, metavar=metavar)


ModelFlag = Annotated[
    str | None, _option("-m", "--model", text="Model, if not the first argument.")
]
MaxTokens = Annotated[int, _option("-n", "--max-tokens", text="Most tokens to answer with.")]
Context = Annotated[int | None, _option("-c", "--context", text="Tokens of context.")]
Threads = Annotated[int | None, _option("-t", "--threads", text="Processor threads.")]
Temperature = Annotated[float, _option("--temperature", text="0: always the likeliest token.")]
TopK = Annotated[int, _option("--top-k", text="Draw from the k likeliest; 0: from all.")]
TopP = Annotated[float, _option("--top-p", text="Draw from the likeliest that sum to p; 1: all.")]
MinP = Annotated[float, _option("--min-p", text="Draw from those at least p times the likeliest.")]
Penalty = Annotated[float, _option("--repeat-penalty", text="Above 1: repeat less.")]
Seed = Annotated[int | None, _option("--seed", text="The same seed draws the same answer.")]
Stop = Annotated[list[str] | None, _option("--stop", text="Stop before this text (repeatable).")]
System = Annotated[str | None, _option("--system", text="System prompt.")]
Raw = Annotated[bool, _option("--raw/--no-raw", text="The prompt as it is: no chat template.")]
Native = Annotated[
    bool, _option("--native/--no-native", text="Use the compiled row kernels, where they can be.")
]
Memory = Annotated[
    str, _option("--memory", text="The most this process may take: 900MB, 4GB, 75% or auto.")
]
Verify = Annotated[
    str, _option("--verify", text="Check weights read from disk: first (time), always or never.")
]
Force = Annotated[bool, _option("--force", text="Run even in less memory than is needed.")]
AsJson = Annotated[bool, _option("--json", text="Print one JSON object.")]
Verbose = Annotated[bool, _option("-v", "--verbose", text="Say more, on standard error.")]
Quiet = Annotated[bool, _option("-q", "--quiet", text="No bars, no statistics.")]
Encoding = Annotated[
    str, _option("--encoding", text="auto (from the file), bf16, fp32, int8 or int4.")
]


@app.command()
def run(
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
    memory: Memory = "auto",
    verify: Verify = "first",
    force: Force = False,
    encoding: Encoding = "auto",
    native: Native = True,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Answer one prompt. One argument is the prompt, unless it names a model: that opens a chat."""
    from outsize import loading, terminal

    options = Options(
        max_tokens, temperature, top_k, top_p, min_p, repeat_penalty, seed, tuple(stop or ()),
        system, raw,
    )  # fmt: skip
    name, prompt = terminal.understand(arguments or [], model)
    if prompt is None and as_json:
        raise typer.BadParameter("--json needs a prompt")
    wishes = loading.Wishes(memory, context, encoding, verify, force, native, quiet)
    how = terminal.How(wishes, threads, as_json, verbose)
    if prompt is None:
        terminal.chat(name, options, how)
    else:
        terminal.answer(name, prompt, options, how)


@app.command()
def chat(
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
    memory: Memory = "auto",
    verify: Verify = "first",
    force: Force = False,
    encoding: Encoding = "auto",
    native: Native = True,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Talk. /reset forgets, /system TEXT begins anew under it, /stats counts, /bye leaves."""
    from outsize import loading, terminal

    options = Options(
        max_tokens, temperature, top_k, top_p, min_p, repeat_penalty, seed, tuple(stop or ()),
        system,
    )  # fmt: skip
    wishes = loading.Wishes(memory, context, encoding, verify, force, native, quiet)
    how = terminal.How(wishes, threads, False, verbose)
    terminal.chat(model or name or DEFAULT_MODEL, options, how)


@app.command()
def plan(
    model: Annotated[str, typer.Argument()] = DEFAULT_MODEL,
    memory: Memory = "auto",
    context: Context = None,
    prompt_tokens: Annotated[
        int, _option("--prompt-tokens", text="Predict the first token after so many.")
    ] = 512,
    threads: Threads = None,
    force: Force = False,
    encoding: Encoding = "auto",
    native: Native = True,
    as_json: AsJson = False,
    html: Annotated[Path | None, _option("--html", text="Write a page with the curve.")] = None,
    quiet: Quiet = False,
) -> None:
    """What will be where and how fast it will be, from headers alone: before any download."""
    from outsize import loading, planning

    loading.set_threads(threads)
    wishes = loading.Wishes(memory, context, encoding, "first", force, native, quiet)
    planning.show(model, wishes, prompt_tokens, as_json, html)


@app.command()
def pack(
    model: Annotated[str, typer.Argument()] = DEFAULT_MODEL,
    encoding: Encoding = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Fetch and convert a model, so that it starts at once."""
    from outsize import library, terminal

    made = library.pack(model, encoding=encoding, quiet=quiet)
    terminal.show_packs([made], as_json)


@app.command(name="list")
def list_packs(as_json: AsJson = False) -> None:
    """The packs on this machine."""
    from outsize import terminal
    from outsize.pack import store

    terminal.show_packs(list(store.packs(store.home() / "packs")), as_json)


@app.command()
def rm(names: Annotated[list[str], typer.Argument(metavar="NAME...")]) -> None:
    """Remove packs, by the names that `outsize list` shows."""
    from outsize.pack import store

    for name in names:
        size = store.remove(store.home() / "packs", name)
        print(f"removed {name} ({size / 1e6:,.0f} MB)")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What this machine is, what it can do, and what would run slowly here and why."""
    from outsize.plan import doctor as doctors

    doctors.show(as_json)


@app.command()
def version() -> None:
    """The version."""
    print(f"outsize {__version__}")


@bench.command()
def speed(
    model: Annotated[str, typer.Argument()] = DEFAULT_MODEL,
    prompt_tokens: Annotated[int, _option("--prompt-tokens", text="Tokens to prefill.")] = 512,
    new_tokens: Annotated[int, _option("--new-tokens", text="Tokens to decode.")] = 64,
    repeats: Annotated[int, _option("--repeats", text="Measured runs.")] = 5,
    batch: Annotated[int, _option("--batch", text="Sequences decoded at once.")] = 1,
    threads: Threads = None,
    native: Native = True,
    quiet: Quiet = False,
) -> None:
    """Ceilings first, then prefill and decode as tokens/s and as a share of the ceiling."""
    from outsize.bench import speed as measure

    measure.show(model, prompt_tokens, new_tokens, repeats, batch, threads, native, quiet)


@bench.command()
def quality(
    model: Annotated[str, typer.Argument()] = DEFAULT_MODEL,
    text: Annotated[Path | None, _option("--text", text="A text file to measure on.")] = None,
    tokens: Annotated[int, _option("--tokens", text="Leading tokens of it.")] = 1024,
    tasks: Annotated[str | None, _option("--tasks", text="lm-eval tasks, comma-separated.")] = None,
    limit: Annotated[int | None, _option("--limit", text="Examples a task.")] = None,
    include: Annotated[Path | None, _option("--include", text="Folder of task files.")] = None,
    encoding: Encoding = "auto",
    native: Native = True,
    quiet: Quiet = False,
) -> None:
    """Perplexity, KL divergence and top-1 agreement against transformers in fp32; lm-eval tasks."""
    from outsize.bench import quality as measure

    if tasks is not None:
        measure.show_tasks(model, tasks.split(","), limit, include, encoding, quiet)
    elif text is not None:
        measure.show(model, text, tokens, encoding, native, quiet)
    else:
        raise typer.BadParameter("give --text FILE or --tasks NAMES")


@bench.command()
def synthetic(
    path: Annotated[Path, typer.Argument(metavar="FILE.gguf|FOLDER")],
    family: Annotated[str, _option("--family", text="Any family we run.")] = "llama",
    size: Annotated[
        str, _option("--size", text="tiny, 0.5b, 1.5b, 2b, 3b, 7b, 8b, 13b, 70b.")
    ] = "7b",
    seed: Annotated[int, _option("--seed", text="Of the random weights.")] = 0,
    encoding: Encoding = "auto",
    quiet: Quiet = False,
) -> None:
    """Write a model with random weights (4-bit GGUF, or a bf16 folder), and pack it."""
    from outsize.bench import synthetic as make

    make.show(path, family, size, seed, encoding, quiet)


def main() -> None:
    """Run a command; print an error as one sentence."""
    try:
        app(default_map=settings.default_map(app))
    except OutsizeError as e:
        plain = not sys.stderr.isatty() or settings.no_color()
        label = "error:" if plain else "\033[31merror:\033[0m"
        print(f"{label} {e}", file=sys.stderr)
        sys.exit(e.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)


if __name__ == "__main__":
    main()
