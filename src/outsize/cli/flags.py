"""The flags that several commands have, once."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def option(*names: str, text: str, metavar: str | None = None) -> Any:
    """A flag with its twin in the environment."""
    long = next(n for n in names if n.startswith("--")).split("/")[0]
    env = "OUTSIZE_" + long[2:].upper().replace("-", "_")
    return typer.Option(*names, help=text, envvar=env, metavar=metavar)


def told(context: typer.Context) -> frozenset[str]:
    """Names of what stands on the command line itself, not in the environment or config.toml: those are
    defaults for many commands and models, used where they apply; a flag is used or refused."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return frozenset(
        name for name, found in sources.items() if found and found.name == "COMMANDLINE"
    )


ModelFlag = Annotated[str | None, option("-m", "--model", text="Model, if not the first argument.")]
MaxTokens = Annotated[int, option("-n", "--max-tokens", text="Most tokens to answer with.")]
Context = Annotated[int | None, option("-c", "--context", text="Tokens of context.")]
Threads = Annotated[int | None, option("-t", "--threads", text="Processor threads.")]
Temperature = Annotated[float, option("--temperature", text="0: always the likeliest token.")]
TopK = Annotated[int, option("--top-k", text="Draw from the k likeliest; 0: from all.")]
TopP = Annotated[float, option("--top-p", text="Draw from the likeliest that sum to p; 1: all.")]
MinP = Annotated[float, option("--min-p", text="Draw from those at least p times the likeliest.")]
Penalty = Annotated[float, option("--repeat-penalty", text="Above 1: repeat less.")]
Seed = Annotated[int | None, option("--seed", text="The same seed draws the same answer.")]
Stop = Annotated[list[str] | None, option("--stop", text="Stop before this text (repeatable).")]
System = Annotated[str | None, option("--system", text="System prompt.")]
Raw = Annotated[bool, option("--raw/--no-raw", text="The prompt as it is: no chat template.")]
Special = Annotated[
    bool,
    option("--special/--no-special", text="In a raw prompt, read control tokens by their names."),
]
TemplateArgs = Annotated[
    list[str] | None,
    option(
        "--template-arg",
        text="A variable for the chat template, as enable_thinking=false (repeatable).",
        metavar="KEY=VALUE",
    ),
]
ShowThinking = Annotated[
    bool | None,
    option(
        "--show-thinking/--hide-thinking",
        text="Print what the model thinks before it answers (at a terminal: dim).",
    ),
]
Overflow = Annotated[
    str,
    option("--overflow", text="A chat that outgrows its context: error, or drop-oldest turns."),
]
Native = Annotated[
    bool, option("--native/--no-native", text="Use the compiled row kernels, where they can be.")
]
Memory = Annotated[
    str, option("--memory", text="The most this process may take: 900MB, 4GB, 75% or auto.")
]
Verify = Annotated[
    str, option("--verify", text="Check weights read from disk: first (time), always or never.")
]
ExpertsFlag = Annotated[
    str | None,
    option(
        "--experts",
        text="How experts are cached: POLICY,prefetch=...,misses=...,routing=... (docs).",
    ),
]
DraftFlag = Annotated[
    str,
    option("--draft", text="What guesses ahead: auto, none, ngram[:k=], model:PATH, mtp:FILE."),
]
AdapterFlag = Annotated[
    list[str] | None,
    option(
        "--adapter",
        text="A LoRA adapter, NAME=PATH (repeatable; the first is used).",
        metavar="NAME=PATH",
    ),
]
Force = Annotated[bool, option("--force", text="Run even in less memory than is needed.")]
AsJson = Annotated[bool, option("--json", text="Print one JSON object.")]
Verbose = Annotated[bool, option("-v", "--verbose", text="Say more, on standard error.")]
Quiet = Annotated[bool, option("-q", "--quiet", text="No bars, no statistics.")]
Encoding = Annotated[
    str, option("--encoding", text="auto (from the file), bf16, fp32, int8 or int4.")
]
