"""Model: generate, stream, chat, score. Closes what it opened; `loading.load` opens it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from os import PathLike
from typing import NoReturn

import torch
from typing_extensions import Unpack

from outsize import arguments
from outsize.draft.load import Drafting
from outsize.engine import decode as flow
from outsize.engine import exits, room
from outsize.engine.conversation import Conversation
from outsize.engine.reply import Reply, Score, account
from outsize.engine.request import Counts, Run
from outsize.engine.scheduler import Flow, drive
from outsize.engine.scoring import scored
from outsize.engine.stream import Streaming
from outsize.engine.turns import Turns
from outsize.errors import ContextError, OptionError
from outsize.kv.kv import KV
from outsize.kv.prefix import CachedPrefix
from outsize.log import warn
from outsize.model.lora import Adapter
from outsize.model.transformer import Transformer
from outsize.options import Changes, Options
from outsize.pack.format import Pack
from outsize.plan.placement import Placement
from outsize.sampling.sample import Sampler, of_each, seeded
from outsize.storage.stats import IOStats
from outsize.system import memory as budget
from outsize.text.channels import PLAIN, format_of
from outsize.text.detokenize import Stream
from outsize.text.prompt import Prompt, encode
from outsize.text.template import Messages
from outsize.text.tokens import Tokens


class Model:
    """A pack, opened; close it, or use it in a `with`. For any number of threads, which take turns step by
    step; after an exception in the middle of one, the next answer is right."""

    def __init__(
        self,
        pack: Pack,
        transformer: Transformer,
        tokens: Tokens,
        placement: Placement,
        drafting: Drafting,
    ) -> None:
        self.pack, self.tokens, self.placement = pack, tokens, placement
        self.drafting = drafting
        self.adapters: dict[str, Adapter] = {}
        self.context = placement.context
        self.given_up = 0  # bytes of weights that were held at first, and had to go
        templates = "\n".join(pack.chat_templates.values())
        self._format = format_of(tokens, templates) if templates else PLAIN
        self._watch = budget.Watch(placement.budget)
        self._transformer: Transformer | None = transformer
        self._turns = Turns(self.name, partial(_restore, transformer, drafting))
        self._end = transformer.loaded.close_with(self)
        budget.promise(self, placement.later)

    @property
    def name(self) -> str:
        return self.pack.path.name

    @property
    def transformer(self) -> Transformer:
        """The network itself, for benchmarks and research. Raises ClosedError, ForkError."""
        self._turns.check()
        assert self._transformer is not None
        return self._transformer

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
        if self._transformer is not None:
            self._turns.close(self._end)
            self.drafting.close()
            self.adapters.clear()
        self._transformer = None
        budget.promise(self, 0)
        budget.trim()

    def stream(self, prompt: Prompt, **changes: Unpack[Changes]) -> Streaming:
        """Iterate over the pieces of a reply to a prompt, or to a chat's messages."""
        return self.stream_from(prompt, Options().with_changes(changes))

    def generate(self, prompts: str | Sequence[Prompt], **changes: Unpack[Changes]) -> list[Reply]:
        """Reply to several prompts at once, as one ragged batch: each gets the text it would get
        alone. A single string is a batch of one. Without `seed`, each draws with its own, which its
        reply's options tell."""
        started, options = time.perf_counter(), Options().with_changes(changes)
        if not isinstance(prompts, str | list | tuple):
            raise arguments.wrong("prompts", prompts, "a string, or a list of prompts")
        batch = [prompts] if isinstance(prompts, str) else list(prompts)
        options.check_adapters(len(batch))
        each, replies = of_each(options, len(batch)), list[Reply]()
        for wave in self._waves(self._encode(batch, options), options):
            replies += self._together(wave, each[len(replies) :], started)
        return replies

    def _waves(self, batch: list[list[int]], options: Options) -> Iterator[list[list[int]]]:
        """As many prompts at once as there is memory for their keys and values."""
        wave: list[list[int]] = []
        used = 0
        for ids in batch:
            size = self._limit(ids, options)
            if wave and used + size > self.placement.kv_tokens:
                yield wave
                wave, used = [], 0
            wave.append(ids)
            used += size
        if wave:
            yield wave

    def _together(
        self, wave: list[list[int]], each: Sequence[Options], started: float
    ) -> Iterator[Reply]:
        """Some prompts, with the options of each."""
        before = self.counts()
        runs = [self.start(ids, options) for ids, options in zip(wave, each, strict=False)]
        for _ in self._drive(runs, each[0]):
            now = time.perf_counter()
            for run in runs:
                run.advance(now, self.bytes_read)
        for run, options in zip(runs, each, strict=False):
            yield self._reply(run, options, started, before)

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
        self._turns.check()
        tokens = self.tokens.encode(arguments.text("text", text), start=True)
        self._check_room(tokens)
        return Score(tokens, self.score_tokens(tokens)[0])

    def score_tokens(self, tokens: Sequence[int]) -> tuple[list[float], list[bool]]:
        """Of every token after the first: its log-probability, and whether it was the likeliest."""
        for token in tokens:
            arguments.whole("a token", token, -(1 << 62), 1 << 62)
        self.tokens.check(tokens)
        return self._turns.take(partial(scored, self.transformer, tokens))

    def stream_from(
        self, prompt: Prompt, options: Options, past: CachedPrefix | None = None
    ) -> Streaming:
        started, options = time.perf_counter(), seeded(options)
        options.check_adapters(1)
        (ids,) = self._encode([prompt], options)
        return Streaming(self, self.start(ids, options, past), options, started)

    def _encode(self, prompts: Sequence[Prompt], options: Options) -> list[list[int]]:
        self._turns.check()
        with exits.work():
            return encode(self.pack, self.tokens, prompts, options)

    def count(self, prompt: Prompt, options: Options | None = None) -> int:
        """Tokens of a prompt, or of a chat's messages."""
        return len(self._encode([prompt], options or Options())[0])

    def _check_room(self, tokens: Sequence[int]) -> None:
        if len(tokens) > self.context:
            raise ContextError(
                f"the text has {len(tokens):,} tokens, the context holds {self.context:,}; shorten "
                f"it, or raise --context (this model goes to {self.pack.description.context:,})"
            )
        self.tokens.check(tokens)

    def start(self, ids: list[int], options: Options, past: CachedPrefix | None = None) -> Run:
        self._check_room([*ids, 0] if ids else ids)
        limit = self._limit(ids, options)
        stops = [self.tokens.control(stop) for stop in options.stop]
        ends = frozenset([*self.pack.eos, *(i for i in stops if i is not None)])
        seq = flow.Sequence(list(ids), len(ids), limit, ends)
        form = PLAIN if options.raw else self._format.after(self.tokens, ids)
        stream, name = Stream(self.tokens, options.stop, form), options.for_prompt(0).adapter
        assert name is None or isinstance(name, str)
        self._adapter(name)
        cached = 0 if past is None else past.shared(ids, name)
        kv = self.new_kv(limit) if past is None else past.kv
        kv.truncate(cached)
        return Run(seq, kv, stream, cached, cached, adapter=name, seed=options.seed)

    def new_kv(self, tokens: int) -> KV:
        """An empty cache for so many tokens, and what is drafted behind them."""
        return self.transformer.new_kv(tokens + self.drafting.spare)

    def load_adapter(self, name: str, path: str | PathLike[str]) -> None:
        """Make a LoRA adapter (PEFT's safetensors) known under a name, for requests to use. Weights make room
        for it where need be. Raises AdapterError, and BudgetError before anything is read."""
        name, file = arguments.text("name", name), arguments.path("path", path)
        room.load(self, self._turns.take, name, file)
        budget.trim()  # what making it took for a moment

    def _adapter(self, name: str | None) -> Adapter | None:
        if name is not None and name not in self.adapters:
            known = ", ".join(self.adapters) or "none is loaded"
            raise OptionError(
                f"adapter {name!r} is not known: {known}; --adapter NAME=PATH loads one"
            )
        return None if name is None else self.adapters[name]

    def _limit(self, ids: Sequence[int], options: Options) -> int:
        return min(len(ids) + options.max_tokens, self.context)

    def _drive(self, runs: Sequence[Run], options: Options) -> Iterator[None]:
        """Step by step."""
        flows = [self._flow(run, options, len(runs) - 1) for run in runs]
        steps = drive(self.transformer, flows, [run.kv for run in runs], self.drafting.step_times)
        while self._turns.take(partial(self._step, steps, runs)):
            yield

    def _step(self, steps: Iterator[None], runs: Sequence[Run]) -> bool:
        """False if there was none any more."""
        if next(steps, steps) is steps:
            return False
        for run in runs:
            run.known = min(len(run.seq.tokens) - 1, run.kv.length)
        self._keep_promise()
        return True

    def _flow(self, run: Run, options: Options, others: int) -> Flow:
        seed = options.seed if run.seed is None else run.seed
        assert seed is not None
        sampler = Sampler(options, seed)
        drafter, check = self.drafting.new(sampler, others)
        adapter = self._adapter(run.adapter)
        return flow.decode(run.seq, drafter, sampler, run.cached, run.drafts, adapter, check)

    def _keep_promise(self) -> None:
        """Give up held weights if others need the memory, or we have more than was promised."""
        if excess := self._watch.excess():
            self.give_up(excess, f"memory is short by {excess / 1e6:,.0f} MB")

    def give_up(self, size: int, why: str) -> None:
        """Held weights, between two steps."""
        if freed := self.transformer.shrink(size):
            self.given_up += freed
            warn(
                f"{why}: {freed / 1e6:,.0f} MB of weights are read from disk from now on, which is slower"
            )

    def counts(self) -> Counts:
        """What has been read and waited for so far."""
        loaded = self.transformer.loaded
        traffic = loaded.traffic + loaded.expert_traffic, loaded.expert_traffic + IOStats()
        return Counts(*traffic, *self.transformer.steps)

    @property
    def bytes_read(self) -> int:
        """Of weights, since the model was opened. Raises ClosedError."""
        loaded = self.transformer.loaded
        return loaded.traffic.bytes_read + loaded.expert_traffic.bytes_read

    @property
    def traffic(self) -> IOStats:
        """What has been asked for and read so far. Raises ClosedError."""
        return self.counts().total

    def _reply(self, run: Run, options: Options, started: float, before: Counts) -> Reply:
        size, threads = self.placement.budget, torch.get_num_threads()
        shown = {**options.to_json(), "context": self.context, "threads": threads, "memory": size}
        tables = self.transformer.loaded.tables
        cached = not all(table.is_direct for table in tables)
        return account(run, self.name, shown, started, before, self.counts(), cached)


def _restore(transformer: Transformer, drafting: Drafting) -> None:
    """After a step that an exception broke off."""
    transformer.restore()
    drafting.restore()
