"""`outsize bench ...`: measure. Imports of anything heavy happen inside the commands."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from outsize.arguments import whole
from outsize.cli.bench_parallel import parallel
from outsize.cli.command import only, with_flags
from outsize.cli.flags import DisplayOptions, Flag
from outsize.cli.settings import config_path
from outsize.errors import OptionError
from outsize.options import CAPACITIES, DEFAULT_MODEL, EVICTIONS, LoadOptions

app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Measure: speed, quality, drafts, expert caches, a server under load.",
)


app.command()(parallel)


@dataclass(frozen=True, slots=True)
class SpeedFlags:
    """How much to run. What `asdict` gives are the measurement's options, as in all that follow."""

    prompt_tokens: Annotated[int, Flag("--prompt-tokens", "Tokens to prefill.")] = 512
    new_tokens: Annotated[int, Flag("--new-tokens", "Tokens to decode.")] = 64
    repeats: Annotated[int, Flag("--repeats", "Measured runs.")] = 5
    batch: Annotated[int, Flag("--batch", "Sequences decoded at once.")] = 1
    prefill: str = "full"
    threads: int | None = None
    native: bool = True
    quiet: bool = False
    memory: str = "auto"
    ranks: int = 1
    listen: str | None = None
    parallel: str = "tensor"


@app.command()
@with_flags
def speed(own: SpeedFlags, model: Annotated[str, typer.Argument()] = DEFAULT_MODEL) -> None:
    """Ceilings first, then prefill and decode as tokens/s and as a share of the ceiling; JSON last."""
    from outsize.bench import speed as measure

    measure.show(model, measure.SpeedOptions(**asdict(own)))


@dataclass(frozen=True, slots=True)
class QualityFlags:
    """What to measure on."""

    text: Annotated[Path | None, Flag("--text", "A text file to measure on.")] = None
    tokens: Annotated[int, Flag("--tokens", "Leading tokens of it.")] = 1024
    tasks: Annotated[str | None, Flag("--tasks", "lm-eval tasks, comma-separated.")] = None
    limit: Annotated[int | None, Flag("--limit", "Examples a task.")] = None
    include: Annotated[Path | None, Flag("--include", "Folder of task files.")] = None


@app.command()
@with_flags
def quality(
    own: QualityFlags,
    load: Annotated[LoadOptions, only("encoding", "native", "quiet")],
    given: frozenset[str],
    model: Annotated[str, typer.Argument()] = DEFAULT_MODEL,
) -> None:
    """Perplexity, KL divergence and top-1 agreement against transformers in fp32; lm-eval tasks."""
    from outsize.bench import quality as measure

    if (own.tasks is None) == (own.text is None):
        raise OptionError("give one of the two: --text FILE or --tasks NAMES")
    for name in ("tokens",) if own.text is None else ("limit", "include"):
        if name in given:
            raise OptionError(
                f"--{name} is for {'--text' if own.text is None else '--tasks'}; leave it out"
            )
    whole("tokens", own.tokens, 32, 1 << 24)
    if own.text is not None:
        measure.show(model, own.text, own.tokens, load)
    else:
        measure.show_tasks(model, str(own.tasks).split(","), own.limit, own.include, load)


@dataclass(frozen=True, slots=True)
class SpeculateFlags:
    """What is answered, and in what share of memory."""

    prompts: Annotated[
        Path | None, Flag("--prompts", "JSON lines with `category` and `turns` or `prompt`.")
    ] = None
    draft: str = "auto"
    memory: str = "auto"
    context: int = 2048
    new_tokens: Annotated[int, Flag("--new-tokens", "Tokens of an answer.")] = 128
    per_category: Annotated[int, Flag("--per-category", "Prompts of each; 0: all.")] = 0
    held: Annotated[float, Flag("--held", "Share of the weights to hold in memory.")] = 1.0
    each: Annotated[
        bool, Flag("--each", "Hold it with drafts, too; else both have the budget of none.")
    ] = False


@app.command()
@with_flags
def speculate(
    own: SpeculateFlags,
    display: Annotated[DisplayOptions, only("json")],
    load: Annotated[LoadOptions, only("threads", "quiet")],
    model: Annotated[str, typer.Argument()] = DEFAULT_MODEL,
) -> None:
    """Drafts against none, by category: tokens a step, tokens/s, ratio; texts must be the same."""
    from outsize.bench import speculate as measure

    if own.prompts is None:
        raise OptionError("give --prompts FILE")
    options = measure.SpeculateOptions(**asdict(own), threads=load.threads, quiet=load.quiet)
    measure.show(model, options, display.json)


@dataclass(frozen=True, slots=True)
class PrefillFlags:
    """Which prompts, in which ways."""

    lengths: Annotated[str, Flag("--lengths", "Tokens of prompts, as 512,1k,4k.")] = "512,1k,2k,4k"
    prompts: Annotated[
        Path | None, Flag("--prompts", "A text that prompts are cut from; else random tokens.")
    ] = None
    lazy: Annotated[str, Flag("--lazy", "Ways of lazy prefill to compare.")] = (
        "lazy:gentle,lazy:fast"
    )
    repeats: Annotated[int, Flag("--repeats", "Prompts of each length.")] = 3


@app.command()
@with_flags
def prefill(
    own: PrefillFlags,
    display: Annotated[DisplayOptions, only("json")],
    load: Annotated[LoadOptions, only("memory", "context", "threads", "encoding", "quiet")],
    model: Annotated[str, typer.Argument()] = DEFAULT_MODEL,
    html: Annotated[Path | None, Flag("--html", "Write a page with plots.")] = None,
) -> None:
    """Seconds to the first token: whole, lazy (lossy), and with a beginning that was computed before."""
    from outsize.bench import prefill as measure

    measure.show(model, measure.PrefillOptions(**asdict(own)), load, display.json, html)


@dataclass(frozen=True, slots=True)
class ServeFlags:
    """What load is put on which server."""

    loads: Annotated[
        str,
        Flag(
            "--loads",
            "one, many, batch, long, idle, prefix; and disconnects, soak, overload, hostile, bits; or all.",
        ),
    ] = "one,many,long,idle,prefix"
    url: Annotated[str, Flag("--url", "A server that runs; else one is started.")] = ""
    api_key: Annotated[str, Flag("--api-key", "That it asks for.")] = ""
    streams: Annotated[str, Flag("--streams", "Clients at once, as 8, or 1,4,16 in turn.")] = "8"
    requests: Annotated[int, Flag("--requests", "Of a load; 0: as many as it is made for.")] = 0
    prompt_tokens: Annotated[int, Flag("--prompt-tokens", "Of a short prompt, about.")] = 60
    new_tokens: Annotated[int, Flag("--new-tokens", "Of a reply.")] = 96
    long_tokens: Annotated[int, Flag("--long-tokens", "Of a long prompt, about.")] = 4000
    seconds: Annotated[float, Flag("--seconds", "Of a soak.")] = 60.0
    limit: Annotated[float, Flag("--limit", "Seconds after which a load is ended.")] = 600.0
    repeats: Annotated[int, Flag("--repeats", "Of all loads, in turn.")] = 1
    seed: Annotated[int, Flag("--seed", "Of prompts and arrivals.")] = 0
    chat: Annotated[bool, Flag("--chat", "Ask through the model's chat template.")] = False
    ignore_eos: Annotated[
        bool, Flag("--ignore-eos/--no-ignore-eos", "Replies go on after their end.")
    ] = True
    in_process: Annotated[
        bool, Flag("--in-process", "Beside the same model without a server, in turn.")
    ] = False
    serve: Annotated[str, Flag("--serve", "More flags of the server, as one text.")] = ""
    wrap: Annotated[str, Flag("--wrap", "A command that runs the server, as under a cap.")] = ""


@app.command()
@with_flags
def serve(
    own: ServeFlags,
    display: Annotated[DisplayOptions, only("json")],
    load: Annotated[LoadOptions, only("memory", "context", "threads", "draft", "quiet")],
    model: Annotated[str, typer.Argument()] = DEFAULT_MODEL,
) -> None:
    """A server under load: first tokens, gaps, tokens/s, errors, memory; exit status 1 if it fails one."""
    from outsize.bench.serve import show as measure
    from outsize.bench.serve.options import ServeOptions

    if not measure.show(model, ServeOptions(**asdict(own)), load, display.json):
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class SyntheticFlags:
    """What is made up."""

    family: Annotated[str, Flag("--family", "Any family we run.")] = "llama"
    size: Annotated[
        str, Flag("--size", "tiny, 0.5b ... 70b; with experts tiny-moe, 7b-a1b, 30b-a3b.")
    ] = "7b"
    seed: Annotated[int, Flag("--seed", "Of the random weights.")] = 0
    types: Annotated[str, Flag("--types", "Of a GGUF's tensors: q4_0, q4_k_m or q3_k.")] = "q4_0"


@app.command()
@with_flags
def synthetic(
    path: Annotated[Path, typer.Argument(metavar="FILE.gguf|FOLDER")],
    own: SyntheticFlags,
    load: Annotated[LoadOptions, only("encoding", "quiet")],
) -> None:
    """Write a model with random weights (4-bit GGUF, or a bf16 folder), and pack it."""
    from outsize.bench.synthetic import make

    what = make.What(own.family, own.size, own.seed, own.types)
    make.show(path, what, load.encoding, load.quiet)


@dataclass(frozen=True, slots=True)
class ReplayFlags:
    """The caches to try, and the link and processor they stand before."""

    capacity: Annotated[str, Flag("--capacity", "Shares of all experts that have slots.")] = (
        CAPACITIES
    )
    eviction: Annotated[str, Flag("--eviction", "Policies.")] = EVICTIONS
    prefetch: Annotated[
        str, Flag("--prefetch", "none, top:K, score:P, quantile:Q, previous, oracle:RECALL.")
    ] = "none"
    miss: Annotated[str, Flag("--miss", "fetch, drop:SHARE, substitute.")] = "fetch"
    bandwidth: Annotated[str, Flag("--bandwidth", "Of the link.")] = "1GB/s"
    record_bytes: Annotated[
        int | None, Flag("--record-bytes", "Of an expert, if not the trace's.")
    ] = None
    layer_ms: Annotated[float, Flag("--layer-ms", "Computing a layer, for a token.")] = 0.0
    expert_ms: Annotated[float, Flag("--expert-ms", "Computing an expert.")] = 0.0
    per_layer: Annotated[bool, Flag("--per-layer/--global", "Each layer has slots of its own.")] = (
        False
    )


@dataclass(frozen=True, slots=True)
class ReplayOutput:
    """Where the result goes."""

    html: Annotated[Path | None, Flag("--html", "Write a page with plots.")] = None
    write_config: Annotated[
        bool, Flag("--write-config/--no-write-config", "Make the engine use the best.")
    ] = False


@app.command()
@with_flags
def cache(
    traces: Annotated[list[Path], typer.Argument(metavar="TRACE...", help="From `outsize trace`.")],
    own: ReplayFlags,
    display: Annotated[DisplayOptions, only("json")],
    output: ReplayOutput,
    load: Annotated[LoadOptions, only("quiet")],
) -> None:
    """Replay recorded routing under cache policies, in virtual time; name the one to use here."""
    from outsize.bench import cache as measure

    config = config_path() if output.write_config else None
    options = measure.CacheOptions(**asdict(own))
    measure.show(traces, options, display.json, output.html, config, load.quiet)
