"""Model: generate, stream, chat, score. `engine/load.py` opens one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import NoReturn

from typing_extensions import Unpack

from outsize import arguments
from outsize.draft.load import Drafting
from outsize.engine import adapters, decode, shutdown
from outsize.engine.batch import Batch
from outsize.engine.conversation import Conversation
from outsize.engine.reply import Reply, Score
from outsize.engine.request import Counts, Request
from outsize.engine.scheduler import Scheduler
from outsize.engine.scoring import Scored, scored
from outsize.engine.stream import Streaming
from outsize.errors import ContextError, OptionError
from outsize.forward.prune import Prune, parse_prefill
from outsize.kv.kv import KV
from outsize.kv.prefix import CachedPrefix
from outsize.model.lora import Adapter
from outsize.model.transformer import Transformer
from outsize.options import MOST_LOGPROBS, Changes, Options
from outsize.pack.format import Pack
from outsize.plan import decide
from outsize.plan.placement import Placement
from outsize.sampling.sample import of_each, seeded
from outsize.storage.stats import IOStats
from outsize.system import memory
from outsize.text.channels import PLAIN, format_of
from outsize.text.detokenize import Stream
from outsize.text.grammar import Grammars
from outsize.text.prompt import Prompt, encode
from outsize.text.size import check_size
from outsize.text.template import Messages
from outsize.text.tokens import Tokens


class Model:
    """A pack, opened; close it, or use it in a `with`. Any number of threads may use it: they take turns step
    by step, and after an exception in the middle of a step the next answer is right."""

    def __init__(
        self,
        pack: Pack,
        tokens: Tokens,
        scheduler: Scheduler,
        prefill: str = "full",
        width: str | float = "full",
    ) -> None:
        """`prefill`: how prompts are run whose options do not say; `width`: of nested experts, likewise."""
        self.pack, self.tokens, self.scheduler, self.prefill = pack, tokens, scheduler, prefill
        self._width = width
        templates = "\n".join(pack.chat_templates.values())
        self._format = format_of(tokens, templates) if templates else PLAIN
        self._grammars = Grammars(tokens, pack.eos)

    @property
    def name(self) -> str:
        return self.scheduler.name

    @property
    def context(self) -> int:
        """Tokens that a prompt and its reply may have."""
        return self.scheduler.placement.context

    @property
    def longest(self) -> int:
        """Tokens of context that the network was made for."""
        return self.pack.description.context

    @property
    def placement(self) -> Placement:
        """Which weights are in memory, and what else takes memory."""
        return self.scheduler.placement

    @property
    def given_up(self) -> int:
        """Bytes of weights that were in memory at first, and had to go."""
        return self.scheduler.given_up

    @property
    def adapters(self) -> dict[str, Adapter]:
        """LoRA adapters by name."""
        return self.scheduler.adapters

    @property
    def drafting(self) -> Drafting:
        """What drafts tokens."""
        return self.scheduler.drafting

    @property
    def transformer(self) -> Transformer:
        """The network itself, for benchmarks and research. Raises ClosedError, ForkError."""
        return self.scheduler.transformer

    @property
    def bytes_read(self) -> int:
        """Of weights, since the model was opened. Raises ClosedError."""
        return self.scheduler.bytes_read

    @property
    def traffic(self) -> IOStats:
        """What has been asked for and read so far. Raises ClosedError."""
        return self.scheduler.counts().total

    def counts(self) -> Counts:
        """What has been read and waited for so far. Raises ClosedError."""
        return self.scheduler.counts()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise OptionError(
            f"the model {self.name} cannot be pickled or copied: it is threads, open files and the memory of "
            "this process; pass its name, and load it there"
        )

    def close(self) -> None:
        """Release the weights, threads, files and memory, once a step that another thread is in has ended."""
        self.scheduler.close()

    def stream(self, prompt: Prompt, **changes: Unpack[Changes]) -> Streaming:
        """Iterate over the pieces of a reply to a prompt, or to a chat's messages."""
        return self.stream_from(prompt, Options().with_changes(changes))

    def generate(self, prompts: str | Sequence[Prompt], **changes: Unpack[Changes]) -> list[Reply]:
        """Reply to several prompts at once, as one ragged batch: each gets the text it would get
        alone. A single string is a batch of one. Without `seed`, each draws with its own, which its
        reply's options state."""
        started, options = time.perf_counter(), Options().with_changes(changes)
        if not isinstance(prompts, str | list | tuple):
            raise arguments.wrong("prompts", prompts, "a string, or a list of prompts")
        batch = [prompts] if isinstance(prompts, str) else list(prompts)
        options.check_adapters(len(batch))
        each, before = of_each(options, len(batch)), self.counts()
        ids = self.encode_fitting(batch, options)
        requests = [self.start(*pair) for pair in zip(ids, each, strict=True)]
        together = Batch(self.scheduler)
        for request in requests:
            together.add(request)
        while ran := together.step():
            together.check()
            now = time.perf_counter()
            for request in ran:
                request.advance(now, self.bytes_read)
        together.check()
        self.scheduler.settle()
        return [self.scheduler.reply(request, started, before) for request in requests]

    def chat(self, messages: Messages, **changes: Unpack[Changes]) -> Reply:
        """Reply to messages ({"role": ..., "content": ...})."""
        streaming = self.stream(messages, **changes)
        for _ in streaming:
            pass
        return streaming.reply

    def conversation(self, overflow: str = "error", **changes: Unpack[Changes]) -> Conversation:
        """A chat that remembers, and does not compute again what it knows. `overflow` says what happens when
        it outgrows the context: "error", or "drop-oldest" turns."""
        return Conversation(self, Options().with_changes(changes), overflow)

    def score(self, text: str) -> Score:
        """The log-probability of every token of a text after the first. No chat template."""
        self.scheduler.check()
        tokens = self.tokens.encode(arguments.text("text", text), start=True)
        self._check_room(tokens)
        found = [one.token.logprob for part in self._scored(tokens) for one in part]
        return Score(tokens, found)

    def score_tokens(self, tokens: Sequence[int]) -> tuple[list[float], list[bool]]:
        """Of every token after the first: its log-probability, and whether it was the likeliest."""
        found = self.logprobs(tokens)
        return [one.token.logprob for one in found], [one.is_likeliest for one in found]

    def logprobs(self, tokens: Sequence[int], top: int = 0) -> list[Scored]:
        """As `score_tokens`, with the `top` likeliest tokens in each place."""
        return [one for part in self.logprobs_by_chunk(tokens, top) for one in part]

    def logprobs_by_chunk(
        self, tokens: Sequence[int], top: int = 0, width: str | float | None = None
    ) -> Iterator[list[Scored]]:
        """As `logprobs`, chunk by chunk: others have steps between them. `width`: as a request's."""
        for token in tokens:
            arguments.whole("a token", token, -(1 << 62), 1 << 62)
        self._check_room(tokens)
        return self._scored(tokens, arguments.whole("top", top, 0, MOST_LOGPROBS), width)

    def _scored(
        self, tokens: Sequence[int], top: int = 0, width: str | float | None = None
    ) -> Iterator[list[Scored]]:
        wanted = self.transformer.nested.width(self._width if width is None else width)
        parts = scored(self.transformer, tokens, top, wanted)
        while (part := self.scheduler.take(partial(next, parts, None))) is not None:
            yield part

    def stream_from(
        self, prompt: Prompt, options: Options, prefix: CachedPrefix | None = None
    ) -> Streaming:
        """As `stream`, with the options as one object, over keys and values that are there."""
        started, options = time.perf_counter(), seeded(options)
        options.check_adapters(1)
        (ids,) = self.encode_fitting([prompt], options)
        return Streaming(self.scheduler, self.start(ids, options, prefix), started)

    def encode(self, prompts: Sequence[Prompt], options: Options) -> list[list[int]]:
        """Token ids of prompts, with the chat template where it is due. Raises OptionError, TemplateError."""
        self.scheduler.check()
        with shutdown.work():
            return encode(self.pack, self.tokens, prompts, options)

    def encode_fitting(self, prompts: Sequence[Prompt], options: Options) -> list[list[int]]:
        """As `encode`, of prompts that are to be run: raises ContextError where one is far too long, before
        all of it is tokenized."""
        self.scheduler.check()
        for prompt in prompts:
            if isinstance(prompt, str | list | tuple):  # what else there is, `encode` refuses
                check_size(prompt, self.tokens, self.context)
        return self.encode(prompts, options)

    def count(self, prompt: Prompt, options: Options | None = None) -> int:
        """Tokens of a prompt, or of a chat's messages."""
        return len(self.encode([prompt], options or Options())[0])

    def _check_room(self, tokens: Sequence[int]) -> None:
        if len(tokens) > self.context:
            raise ContextError(
                f"the text has {len(tokens):,} tokens, the context holds {self.context:,}; shorten "
                f"it, or raise --context (this model goes to {self.longest:,})"
            )
        self.tokens.check(tokens)

    def start(
        self, ids: list[int], options: Options, prefix: CachedPrefix | None = None
    ) -> Request:
        """A request, ready to be driven. Raises ContextError, OptionError."""
        self._check_room([*ids, 0] if ids else ids)
        limit = self._limit(ids, options)
        stops = [self.tokens.control(stop) for stop in options.stop]
        ends = frozenset() if options.ignore_eos else frozenset(self.pack.eos)
        ends |= {i for i in stops if i is not None}
        form = PLAIN if options.raw else self._format.after(self.tokens, ids)
        constraint = self._grammars.constraint(options, form)
        wanted = self._width if options.width is None else options.width
        options = replace(options, prefill=options.prefill or self.prefill, width=wanted)
        width = self.transformer.nested.width(wanted)
        prune = self._prune(str(options.prefill))
        seq = decode.Sequence(
            list(ids), len(ids), limit, ends, constraint=constraint, prune=prune, width=width
        )
        stream, name = (
            Stream(self.tokens, options.stop, form, options.show_tokens),
            options.adapter_of(0),
        )
        self.scheduler.adapter(name)
        way = name, options.prefill, None if width is None else width.share
        cached = 0 if prefix is None else prefix.shared(ids, way)
        if prefix is not None:
            self.scheduler.conversations.add(prefix)
        kv = self.transformer.new_kv() if prefix is None else prefix.kv
        kv.truncate(cached)
        exact = 0 if prefix is None else prefix.exact
        return Request(
            seq, kv, stream, cached, cached, seeded(options), name, exact, keeps=prefix is None
        )

    def new_kv(self, tokens: int) -> KV:
        """An empty cache for so many tokens, and what is drafted behind them."""
        return self.transformer.new_kv(tokens + self.drafting.spare)

    def load_adapter(self, name: str, path: str | PathLike[str]) -> None:
        """Make a LoRA adapter (PEFT's safetensors) known under a name, for requests to use. Weights make room
        for it where need be. Raises AdapterError, and BudgetError before anything is read."""
        name, file = arguments.text("name", name), arguments.path("path", path)
        adapters.load(self.scheduler, self.pack, name, file)
        memory.trim()  # what making it took for a moment

    def _prune(self, prefill: str) -> Prune | None:
        """Raises OptionError where it cannot be used with this model, or with what drafts."""
        prune = parse_prefill(prefill)
        decide.check_prefill(self.pack.description, prefill)
        if prune is not None:
            prune.check_layers(self.pack.description)
            prune.check_drafts(self.drafting.spec.kind)
        return prune

    def _limit(self, ids: Sequence[int], options: Options) -> int:
        return min(len(ids) + options.max_tokens, self.context)
