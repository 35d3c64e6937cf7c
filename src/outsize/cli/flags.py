"""Every flag that several commands share, once: its names, its help, and the field that it sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from keyword import iskeyword
from pathlib import Path
from typing import Annotated, Any

import typer

from outsize.cli.console import text_of
from outsize.cli.values import parse_arguments, parse_biases, parse_grammar, parse_schema
from outsize.errors import OptionError


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag of the command line. Its long name is also its key in config.toml, and its name in the
    environment after OUTSIZE_."""

    names: str  # as "-n --max-tokens", or "--raw/--no-raw"
    text: str  # its help
    kind: Any = None  # what typer reads, where that is not what the field holds
    read: Callable[[Any], Any] | None = None  # from what typer has read to what the field holds
    metavar: str | None = None
    has_env: bool = True  # False: its variable would be another thing's

    @property
    def name(self) -> str:
        long = next(n for n in self.names.split() if n.startswith("--"))
        name = long.partition("/")[0][2:].replace("-", "_")
        return f"{name}_" if iskeyword(name) else name

    def option(self) -> Any:
        """As typer takes it."""
        env = f"OUTSIZE_{self.name.rstrip('_').upper()}" if self.has_env else None
        return typer.Option(*self.names.split(), help=self.text, envvar=env, metavar=self.metavar)


def named_adapters(given: Sequence[str] | None) -> dict[str, Path]:
    """NAME=PATH texts, split. Raises OptionError."""
    out: dict[str, Path] = {}
    for text in given or ():
        name, _, path = text.partition("=")
        if not name or not path:
            raise OptionError(f"--adapter is {text!r}; NAME=PATH is expected")
        if name in out:
            raise OptionError(f"--adapter names {name!r} twice; give each a name of its own")
        out[name] = Path(path)
    return out


Texts = list[str] | None
ADAPTER = (
    "--adapter",
    "A LoRA adapter, NAME=PATH (repeatable; the first is used, or what a request names).",
)
# By field of `LoadOptions` (opens a model) and of `Options` (a request).
FLAGS = {
    "memory": Flag(
        "--memory", "The most this process may take: 900MB, 4GB, 75% or auto.", kind=str
    ),
    "context": Flag("-c --context", "Tokens of context."),
    "streams": Flag("--streams", "Replies computed at once, for which the plan has room."),
    "chunk": Flag(
        "--chunk", "Tokens of a prompt computed, and kept for later prompts, at once: 32 to 512."
    ),
    "threads": Flag("-t --threads", "Processor threads."),
    "encoding": Flag("--encoding", "auto (from the file), bf16, fp32, int8, int4 or a GGUF type (q4_k)."),
    "verify": Flag("--verify", "Check weights read from disk: first (time), always or never."),
    "force": Flag("--force", "Run even in less memory than is needed."),
    "native": Flag("--native/--no-native", "Use the compiled row kernels, where they can be."),
    "quiet": Flag("-q --quiet", "No bars, no statistics."),
    "experts": Flag(
        "--experts",
        "How experts are cached: POLICY,prefetch=...,misses=...,routing=... (docs).",
    ),
    "draft": Flag(
        "--draft",
        "What drafts tokens: auto, none, ngram[:k=], model:PATH, native[:k=], mtp:FILE, nested[:WIDTH][:k=].",
    ),
    "prefill": Flag(
        "--prefill",
        "full, or lazy[:gentle|fast|SETTINGS]: hardly attended tokens skip layers (lossy).",
    ),
    "kv": Flag("--kv", "Keys and values: auto (as they are computed), or int8: half the memory, lossy."),
    "neurons": Flag(
        "--neurons",
        "Compute and read only neurons that fire: off, auto, or FILE of `outsize adapt sparsity` (lossy).",
    ),
    "width": Flag(
        "--width",
        "Of nested experts (`outsize adapt nested`): full, auto, or a share of them on average (lossy).",
        kind=str,
    ),
    "layers_off": Flag(
        "--layers-off",
        "Leave out the memory (feed-forward of the token's embedding) of some layers, as 3,7-9 (lossy).",
    ),
    "ranks": Flag("--ranks", "Processes that run the model together, each with --memory of its own."),
    "listen": Flag(
        "--listen", "HOST:PORT: wait there for `outsize join` of the other ranks.", kind=str
    ),
    "parallel": Flag(
        "--parallel",
        "How ranks share a model: tensor[:cut=gather|sum,bits=4,drop=auto,...], relay, experts or runahead.",
    ),
    "prefix_cache": Flag(
        "--prefix-cache",
        "Keep prompts for those that begin alike: off, memory or disk[:SIZE][,writes=SIZE a day].", kind=str,
    ),
    "adapters": Flag(*ADAPTER, Texts, named_adapters, "NAME=PATH"),
    "max_tokens": Flag("-n --max-tokens", "Most tokens to answer with."),
    "temperature": Flag("--temperature", "0: always the likeliest token."),
    "top_k": Flag("--top-k", "Draw from the k likeliest; 0: from all."),
    "top_p": Flag("--top-p", "Draw from the likeliest that sum to p; 1: all."),
    "min_p": Flag("--min-p", "Draw from those at least p times the likeliest."),
    "repeat_penalty": Flag("--repeat-penalty", "Above 1: repeat less."),
    "repeat_last_n": Flag("--repeat-last-n", "Tokens that penalties look back at; -1: all."),
    "presence_penalty": Flag("--presence-penalty", "Above 0: avoid what was said."),
    "frequency_penalty": Flag("--frequency-penalty", "Above 0: the more, the oftener it was."),
    "logit_bias": Flag(
        "--logit-bias", "A token's id and what is added to its logit (repeatable).",
        Texts, lambda given: parse_biases(given or ()), "ID=BIAS",
    ),
    "logprobs": Flag("--logprobs", "With --json: log-probabilities, and those of so many likeliest."),
    "ignore_eos": Flag("--ignore-eos", "Go on after the tokens that end a text."),
    "seed": Flag("--seed", "The same seed draws the same answer."),
    "stop": Flag(
        "--stop", "Stop before this text (repeatable).",
        Texts, lambda given: tuple(map(text_of, given or ())),
    ),
    "schema": Flag(
        "--schema", "A JSON schema that the answer obeys: a file, or JSON; {}: any JSON.", str, parse_schema,
        "FILE|JSON",
    ),
    "grammar": Flag(
        "--grammar", "A Lark grammar (llguidance's) that the answer obeys.", str, parse_grammar, "FILE"
    ),
    "system": Flag("--system", "System prompt.", read=lambda s: None if s is None else text_of(s)),
    "raw": Flag("--raw/--no-raw", "The prompt as it is: no chat template."),
    "special": Flag(
        "--special/--no-special", "In a raw prompt, read control tokens by their names."
    ),
    "template_args": Flag(
        "--template-arg", "A variable for the chat template, as enable_thinking=false (repeatable).",
        Texts, lambda given: parse_arguments(given or ()), "KEY=VALUE",
    ),
    "adapter": Flag(*ADAPTER, Texts, lambda given: next(iter(named_adapters(given)), None), "NAME=PATH"),
}  # fmt: skip
JSON = Flag("--json", "Print one JSON object.")
MODEL = Flag("-m --model", "Model, if not the first argument.")


@dataclass(frozen=True, slots=True)
class DisplayOptions:
    """What is shown of a reply, and how."""

    show_thinking: Annotated[
        bool | None,
        Flag(
            "--show-thinking/--hide-thinking",
            "Print what the model thinks before it answers (at a terminal: dim).",
        ),
    ] = None  # None: where a person looks on
    overflow: Annotated[
        str,
        Flag("--overflow", "A chat that outgrows its context: error, or drop-oldest turns."),
    ] = "error"
    json: Annotated[bool, JSON] = False
    verbose: Annotated[bool, Flag("-v --verbose", "Say more, on standard error.")] = False
