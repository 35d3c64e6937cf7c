"""`outsize bench ...`: measure. Imports of anything heavy happen inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from outsize.arguments import whole
from outsize.cli.flags import (
    AsJson,
    DraftFlag,
    Encoding,
    Memory,
    Native,
    Quiet,
    Threads,
    option,
    told,
)
from outsize.errors import OptionError
from outsize.options import CAPACITIES, DEFAULT_MODEL, EVICTIONS

app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Measure: speed, quality, drafts, expert caches.",
)


@app.command()
def speed(
    model: Annotated[str, typer.Argument()] = DEFAULT_MODEL,
    prompt_tokens: Annotated[int, option("--prompt-tokens", text="Tokens to prefill.")] = 512,
    new_tokens: Annotated[int, option("--new-tokens", text="Tokens to decode.")] = 64,
    repeats: Annotated[int, option("--repeats", text="Measured runs.")] = 5,
    batch: Annotated[int, option("--batch", text="Sequences decoded at once.")] = 1,
    threads: Threads = None,
    native: Native = True,
    quiet: Quiet = False,
) -> None:
    """Ceilings first, then prefill and decode as tokens/s and as a share of the ceiling; JSON last."""
    from outsize.bench import speed as measure

    options = prompt_tokens, new_tokens, repeats, batch, threads, native, quiet
    measure.show(model, measure.SpeedOptions(*options))


@app.command()
def quality(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument()] = DEFAULT_MODEL,
    text: Annotated[Path | None, option("--text", text="A text file to measure on.")] = None,
    tokens: Annotated[int, option("--tokens", text="Leading tokens of it.")] = 1024,
    tasks: Annotated[str | None, option("--tasks", text="lm-eval tasks, comma-separated.")] = None,
    limit: Annotated[int | None, option("--limit", text="Examples a task.")] = None,
    include: Annotated[Path | None, option("--include", text="Folder of task files.")] = None,
    encoding: Encoding = "auto",
    native: Native = True,
    quiet: Quiet = False,
) -> None:
    """Perplexity, KL divergence and top-1 agreement against transformers in fp32; lm-eval tasks."""
    from outsize.bench import quality as measure
    from outsize.cli.run import load_options_of

    if (tasks is None) == (text is None):
        raise OptionError("give one of the two: --text FILE or --tasks NAMES")
    for name in ("tokens",) if text is None else ("limit", "include"):
        if name in told(ctx):
            raise OptionError(
                f"--{name} is for {'--text' if text is None else '--tasks'}; leave it out"
            )
    whole("tokens", tokens, 32, 1 << 24)
    load_options = load_options_of(told(ctx), "auto", None, encoding, "first", False, native, quiet)
    if text is not None:
        measure.show(model, text, tokens, load_options)
    else:
        measure.show_tasks(model, str(tasks).split(","), limit, include, load_options)


@app.command()
def speculate(
    model: Annotated[str, typer.Argument()] = DEFAULT_MODEL,
    prompts: Annotated[
        Path | None, option("--prompts", text="JSON lines with `category` and `turns` or `prompt`.")
    ] = None,
    draft: DraftFlag = "auto",
    new_tokens: Annotated[int, option("--new-tokens", text="Tokens of an answer.")] = 128,
    per_category: Annotated[int, option("--per-category", text="Prompts of each; 0: all.")] = 0,
    memory: Memory = "auto",
    held: Annotated[float, option("--held", text="Share of the weights to hold in memory.")] = 1.0,
    each: Annotated[
        bool,
        option("--each", text="Hold it with drafts, too; else both have the budget of none."),
    ] = False,
    context: Annotated[int, option("-c", "--context", text="Tokens of context.")] = 2048,
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Drafts against none, by category: tokens a step, tokens/s, ratio; texts must be the same."""
    from outsize.bench import speculate as measure

    if prompts is None:
        raise OptionError("give --prompts FILE")
    options = measure.SpeculateOptions(
        prompts, draft, new_tokens, per_category, memory, held, each, context, threads, quiet
    )
    measure.show(model, options, as_json)


@app.command()
def synthetic(
    path: Annotated[Path, typer.Argument(metavar="FILE.gguf|FOLDER")],
    family: Annotated[str, option("--family", text="Any family we run.")] = "llama",
    size: Annotated[
        str, option("--size", text="tiny, 0.5b ... 70b; with experts tiny-moe, 7b-a1b, 30b-a3b.")
    ] = "7b",
    seed: Annotated[int, option("--seed", text="Of the random weights.")] = 0,
    encoding: Encoding = "auto",
    quiet: Quiet = False,
) -> None:
    """Write a model with random weights (4-bit GGUF, or a bf16 folder), and pack it."""

    from outsize.bench.synthetic import make

    make.show(path, family, size, seed, encoding, quiet)


@app.command()
def cache(
    traces: Annotated[list[Path], typer.Argument(metavar="TRACE...", help="From `outsize trace`.")],
    capacity: Annotated[
        str, option("--capacity", text="Shares of all experts that have slots.")
    ] = CAPACITIES,
    eviction: Annotated[str, option("--eviction", text="Policies.")] = EVICTIONS,
    prefetch: Annotated[
        str, option("--prefetch", text="none, top:K, score:P, quantile:Q, previous, oracle:RECALL.")
    ] = "none",
    miss: Annotated[str, option("--miss", text="fetch, drop:SHARE, substitute.")] = "fetch",
    bandwidth: Annotated[str, option("--bandwidth", text="Of the link.")] = "1GB/s",
    record_bytes: Annotated[
        int | None, option("--record-bytes", text="Of an expert, if not the trace's.")
    ] = None,
    layer_ms: Annotated[float, option("--layer-ms", text="Computing a layer, for a token.")] = 0.0,
    expert_ms: Annotated[float, option("--expert-ms", text="Computing an expert.")] = 0.0,
    per_layer: Annotated[
        bool, option("--per-layer/--global", text="Each layer has slots of its own.")
    ] = False,
    as_json: AsJson = False,
    html: Annotated[Path | None, option("--html", text="Write a page with plots.")] = None,
    write_config: Annotated[
        bool, option("--write-config/--no-write-config", text="Make the engine use the best.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Replay recorded routing under cache policies, in virtual time; name the one to use here."""
    from outsize.bench import cache as measure
    from outsize.cli.settings import config_path

    options = measure.CacheOptions(
        capacity, eviction, prefetch, miss, bandwidth, record_bytes, layer_ms, expert_ms, per_layer
    )
    measure.show(traces, options, as_json, html, config_path() if write_config else None, quiet)
