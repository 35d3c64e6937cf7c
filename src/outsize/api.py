"""Model: generate, stream, chat, score. Closes what it opened; `loading.load` opens it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypedDict

import torch
from typing_extensions import Unpack

from outsize.cache.kv import KV
from outsize.conversation import Conversation, Past
from outsize.decode import flow
from outsize.decode.channels import PLAIN, format_of
from outsize.decode.engine import Flow, drive
from outsize.decode.prompts import Prompt, encode
from outsize.decode.sample import Sampler, seeded
from outsize.decode.template import Messages
from outsize.decode.text import Stream
from outsize.decode.tokens import Tokens
from outsize.drafting import SPARE, Drafting, read_adapter
from outsize.errors import ClosedError, ContextError, OptionError
from outsize.forward.full import hidden
from outsize.forward.span import Span
from outsize.library import warn
from outsize.model.adapter import Adapter
from outsize.model.transformer import Transformer
from outsize.options import Options
from outsize.pack.format import Pack
from outsize.plan.placement import Placement
from outsize.reply import Counts, Reply, Run, Score, account
from outsize.streaming import Streaming
from outsize.weights import budget
from outsize.weights.traffic import Traffic

SCORE_ROWS, SCORE_BYTES = 64, 8 << 20  # logits computed at once while scoring


class Changes(TypedDict, total=False):
    """The fields of Options, as keywords."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    seed: int | None
    stop: str | Sequence[str]
    system: str | None
    raw: bool
    adapter: str | Sequence[str | None] | None
    special: bool
    template_args: Mapping[str, object] | None


class Model:
    """A pack, opened. Not for two threads at once; close it, or use it in a `with`."""

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

    @property
    def name(self) -> str:
        return self.pack.path.name

    @property
    def transformer(self) -> Transformer:
        """The network itself, for benchmarks and research. Raises ClosedError."""
        if self._transformer is None:
            raise ClosedError(f"the model {self.name} is closed; load it again")
        return self._transformer

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the weights, threads and files."""
        if self._transformer is not None:
            self._transformer.loaded.close()
            self.drafting.close()
        self._transformer = None

    def stream(self, prompt: Prompt, **changes: Unpack[Changes]) -> Streaming:
        """Iterate over the pieces of a reply to a prompt, or to a chat's messages."""
        return self.stream_from(prompt, Options().with_changes(changes))

    def generate(self, prompts: str | Sequence[Prompt], **changes: Unpack[Changes]) -> list[Reply]:
        """Reply to several prompts at once, as one ragged batch: each gets the text it would get
        alone. A single string is a batch of one."""
        started, options = time.perf_counter(), seeded(Options().with_changes(changes))
        batch = [prompts] if isinstance(prompts, str) else list(prompts)
        options.for_prompt(len(batch) - 1)
        replies: list[Reply] = []
        for wave in self._waves(self._encode(batch, options), options):
            replies += self._together(wave, options, started, len(replies))
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
        yield wave

    def _together(
        self, wave: list[list[int]], options: Options, started: float, first: int
    ) -> Iterator[Reply]:
        """Prompts number `first` and on."""
        before = self.counts()
        runs = [self.start(ids, options.for_prompt(first + i)) for i, ids in enumerate(wave)]
        for _ in self._drive(runs, options):
            now = time.perf_counter()
            for run in runs:
                run.advance(now, self.bytes_read)
        yield from (self._reply(run, options, started, before) for run in runs)

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
        tokens = self.tokens.encode(text, start=True)
        self._check_room(tokens)
        return Score(tokens, self.score_tokens(tokens)[0])

    @torch.inference_mode()
    def score_tokens(self, tokens: Sequence[int]) -> tuple[list[float], list[bool]]:
        """Of every token after the first: its log-probability, and whether it was the likeliest."""
        self._check_rows(tokens)
        model, logprobs, likeliest = self.transformer, [], []
        (h_TD,) = hidden(model, [(Span(0, tokens), model.new_kv(len(tokens)))])
        step = max(1, min(SCORE_ROWS, SCORE_BYTES // (4 * self.pack.description.vocab_size)))
        for start in range(0, len(tokens) - 1, step):
            target = torch.tensor(
                tokens[start + 1 : start + 1 + step], dtype=torch.int64, device="cpu"
            )
            logits = model.logits(h_TD[start : start + len(target)])
            rows = torch.log_softmax(logits, dim=1).gather(1, target[:, None])[:, 0]
            logprobs += rows.tolist()
            likeliest += (logits.argmax(1) == target).tolist()
        return logprobs, likeliest

    def stream_from(self, prompt: Prompt, options: Options, past: Past | None = None) -> Streaming:
        started, options = time.perf_counter(), seeded(options)
        (ids,) = self._encode([prompt], options)
        return Streaming(self, self.start(ids, options, past), options, started)

    def _encode(self, prompts: Sequence[Prompt], options: Options) -> list[list[int]]:
        return encode(self.pack, self.tokens, prompts, options)

    def count(self, prompt: Prompt, options: Options | None = None) -> int:
        """Tokens of a prompt, or of a chat's messages."""
        return len(self._encode([prompt], options or Options())[0])

    def _check_room(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise OptionError("the prompt is empty; give at least one character")
        if len(tokens) > self.context:
            raise ContextError(
                f"the text has {len(tokens):,} tokens, the context holds {self.context:,}; shorten "
                f"it, or raise --context (this model goes to {self.pack.description.context:,})"
            )
        self._check_rows(tokens)

    def _check_rows(self, tokens: Sequence[int]) -> None:
        """Raises OptionError for a token that the embedding has no row for."""
        rows = self.pack.description.vocab_size
        for id in (min(tokens), max(tokens)):
            if not 0 <= id < rows:
                name = self.tokens.piece(id) if 0 <= id < 1 << 31 else ""
                raise OptionError(
                    f"the prompt has the token {name!r}, number {id:,}, and the model's embedding has "
                    f"{rows:,} rows: this model cannot read it; leave it out"
                )

    def start(self, ids: list[int], options: Options, past: Past | None = None) -> Run:
        self._check_room([*ids, 0] if ids else ids)
        limit = self._limit(ids, options)
        stops = [self.tokens.control(stop) for stop in options.stop]
        ends = frozenset([*self.pack.eos, *(i for i in stops if i is not None)])
        seq = flow.Sequence(list(ids), len(ids), limit, ends)
        form = PLAIN if options.raw else self._format.after(self.tokens, ids)
        stream, name = Stream(self.tokens, options.stop, form), options.for_prompt(0).adapter
        assert name is None or isinstance(name, str)
        self._adapter(name)
        if past is None:
            return Run(seq, self.new_kv(limit), stream, 0, adapter=name)
        cached = past.shared(ids, name)
        past.kv.truncate(cached)
        return Run(seq, past.kv, stream, cached, adapter=name)

    def new_kv(self, tokens: int) -> KV:
        """An empty cache for so many tokens, and what is drafted behind them."""
        spare = SPARE if self.drafting.spec.kind != "none" else 0
        return self.transformer.new_kv(tokens + spare)

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Make a LoRA adapter (PEFT's safetensors) known under a name, for requests to use. Raises
        AdapterError."""
        self.adapters[name] = read_adapter(self.pack, name, Path(path).expanduser())

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
        assert options.seed is not None
        flows = [self._flow(run, Sampler(options, options.seed), len(runs) - 1) for run in runs]
        for _ in drive(self.transformer, flows, [run.kv for run in runs], self.drafting.pace):
            yield
            self._keep_promise()

    def _flow(self, run: Run, sampler: Sampler, others: int) -> Flow:
        drafter, check = self.drafting.new(sampler, others)
        adapter = self._adapter(run.adapter)
        return flow.decode(run.seq, drafter, sampler, run.cached, run.drafts, adapter, check)

    def _keep_promise(self) -> None:
        """Give up held weights if others need the memory, or we have more than was promised."""
        excess = self._watch.excess()
        if excess and (freed := self.transformer.shrink(excess)):
            self.given_up += freed
            warn(
                f"memory is short by {excess / 1e6:,.0f} MB: {freed / 1e6:,.0f} MB of weights are "
                "read from disk from now on, which is slower"
            )

    def counts(self) -> Counts:
        """What has been read and waited for so far."""
        loaded = self.transformer.loaded
        return Counts(loaded.traffic + loaded.expert_traffic, loaded.expert_traffic + Traffic())

    @property
    def bytes_read(self) -> int:
        """Of weights, since the model was opened. Raises ClosedError."""
        loaded = self.transformer.loaded
        return loaded.traffic.bytes_read + loaded.expert_traffic.bytes_read

    @property
    def traffic(self) -> Traffic:
        """What has been asked for and read so far. Raises ClosedError."""
        return self.counts().total

    def _reply(self, run: Run, options: Options, started: float, before: Counts) -> Reply:
        shown = options.to_json() | {
            "context": self.context,
            "threads": torch.get_num_threads(),
            "memory": self.placement.budget,
        }
        return account(run, self.name, shown, started, before, self.counts())
