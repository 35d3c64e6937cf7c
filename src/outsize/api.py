"""load(source) -> Model: generate, stream, chat, score. Closes what it opened."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TypedDict

import torch
from tokenizers import Tokenizer
from typing_extensions import Unpack

from outsize.bars import bars
from outsize.conversation import Conversation, Past
from outsize.decode import flow
from outsize.decode.engine import drive
from outsize.decode.sample import picker
from outsize.decode.template import Messages, render
from outsize.decode.text import Stream, Tokens
from outsize.draft.none import NoDraft
from outsize.errors import ClosedError, ContextError, OptionError, TemplateError
from outsize.forward.full import hidden
from outsize.forward.span import Span
from outsize.library import pack, warn
from outsize.model.transformer import Transformer
from outsize.native.kernels import kernels
from outsize.options import DEFAULT_MODEL, Options
from outsize.pack import store
from outsize.pack.format import TOKENIZER, Pack, damaged
from outsize.reply import Reply, Run, Score, peak_memory
from outsize.weights.load import load_resident
from outsize.weights.table import Traffic

SCORE_ROWS = 64  # logits computed at once while scoring
Prompt = str | Messages


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


class Streaming:
    """Pieces of a reply as they come; `reply` is its account, whole once the pieces have ended."""

    def __init__(self, model: Model, run: Run, options: Options, started: float) -> None:
        self._model, self.run = model, run
        self._options, self._started = options, started
        self._pieces = self._go()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def _go(self) -> Iterator[str]:
        run = self.run
        for _ in self._model._drive([run], self._options):
            if piece := run.advance(time.perf_counter()):
                yield piece

    def cancel(self) -> None:
        """End the reply after the present step."""
        self.run.seq.finish = self.run.seq.finish or "cancelled"

    @property
    def reply(self) -> Reply:
        return self._model._reply(self.run, self._options, self._started)


class Model:
    """A pack, opened. Not for two threads at once; close it, or use it in a `with`."""

    def __init__(
        self, pack: Pack, transformer: Transformer, tokens: Tokens, context: int, traffic: Traffic
    ) -> None:
        self.pack, self.tokens, self.context, self.traffic = pack, tokens, context, traffic
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
        """Release the weights."""
        self._transformer = None

    def stream(self, prompt: Prompt, **changes: Unpack[Changes]) -> Streaming:
        """Iterate over the pieces of a reply to a prompt, or to a chat's messages."""
        return self.stream_from(prompt, Options().with_changes(changes))

    def generate(self, prompts: str | Sequence[Prompt], **changes: Unpack[Changes]) -> list[Reply]:
        """Reply to several prompts at once, as one ragged batch: each gets the text it would get
        alone. A single string is a batch of one."""
        options, started = Options().with_changes(changes), time.perf_counter()
        options = _seeded(options)
        batch = [prompts] if isinstance(prompts, str) else list(prompts)
        runs = [self.start(ids, options) for ids in self._encode(batch, options)]
        for _ in self._drive(runs, options):
            now = time.perf_counter()
            for run in runs:
                run.advance(now)
        return [self._reply(run, options, started) for run in runs]

    def chat(self, messages: Messages, **changes: Unpack[Changes]) -> Reply:
        """Reply to messages ({"role": ..., "content": ...})."""
        streaming = self.stream(messages, **changes)
        for _ in streaming:
            pass
        return streaming.reply

    def conversation(self, **changes: Unpack[Changes]) -> Conversation:
        """A chat that remembers, and does not compute again what it knows."""
        return Conversation(self, Options().with_changes(changes))

    def score(self, text: str) -> Score:
        """The log-probability of every token of a text after the first. No chat template."""
        tokens = self.tokens.encode(text, start=True)
        self._check_room(tokens)
        return Score(tokens, self.score_tokens(tokens)[0])

    @torch.inference_mode()
    def score_tokens(self, tokens: Sequence[int]) -> tuple[list[float], list[bool]]:
        """Of every token after the first: its log-probability, and whether it was the likeliest."""
        model, logprobs, likeliest = self.transformer, [], []
        h_TD = hidden(model, [(Span(0, tokens), model.new_kv())])
        for start in range(0, len(tokens) - 1, SCORE_ROWS):
            target = torch.tensor(tokens[start + 1 : start + 1 + SCORE_ROWS])
            logits = model.logits(h_TD[start : start + len(target)])
            rows = torch.log_softmax(logits, dim=1).gather(1, target[:, None])[:, 0]
            logprobs += rows.tolist()
            likeliest += (logits.argmax(1) == target).tolist()
        return logprobs, likeliest

    def stream_from(self, prompt: Prompt, options: Options, past: Past | None = None) -> Streaming:
        started, options = time.perf_counter(), _seeded(options)
        (ids,) = self._encode([prompt], options)
        return Streaming(self, self.start(ids, options, past), options, started)

    def _encode(self, prompts: Sequence[Prompt], options: Options) -> list[list[int]]:
        """Prompts as tokens, through the chat template unless raw."""
        template = self.pack.chat_template
        if options.raw or (template is None and all(isinstance(p, str) for p in prompts)):
            if options.system is not None:
                raise OptionError(f"{self.name}: a system prompt needs a chat template")
            if not all(isinstance(p, str) for p in prompts):
                raise OptionError("raw takes prompts that are strings, not messages")
            return [self.tokens.encode(str(p), start=True) for p in prompts]
        if template is None:
            raise TemplateError(
                f"{self.name} has no chat template: it is a base model, which continues a text; "
                "give it a string to continue, as in `outsize run`"
            )
        chats = [_messages(p, options.system) for p in prompts]
        texts = render(template, chats, self._special_names())
        return [self.tokens.encode(text, start=True) for text in texts]

    def _special_names(self) -> dict[str, str]:
        bos, ends = self.pack.bos, self.pack.eos
        return {
            "bos_token": "" if bos is None else self.tokens.piece(bos),
            "eos_token": self.tokens.piece(ends[0]) if ends else "",
        }

    def _check_room(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise OptionError("the prompt is empty; give at least one character")
        if len(tokens) > self.context:
            raise ContextError(
                f"the text has {len(tokens):,} tokens, the context holds {self.context:,}; shorten "
                f"it, or raise --context (this model goes to {self.pack.description.context:,})"
            )

    def start(self, ids: list[int], options: Options, past: Past | None = None) -> Run:
        self._check_room([*ids, 0] if ids else ids)
        limit = min(len(ids) + options.max_tokens, self.context)
        seq = flow.Sequence(list(ids), len(ids), limit, frozenset(self.pack.eos))
        stream = Stream(self.tokens, options.stop)
        if past is None:
            return Run(seq, self.transformer.new_kv(), stream, 0)
        return Run(seq, past.kv, stream, past.shared(ids))

    def _drive(self, runs: Sequence[Run], options: Options) -> Iterator[None]:
        assert options.seed is not None
        pick = [picker(options, options.seed) for _ in runs]
        flows = [
            flow.decode(run.seq, NoDraft(), p, run.cached)
            for run, p in zip(runs, pick, strict=True)
        ]
        return drive(self.transformer, flows, [run.kv for run in runs])

    def _reply(self, run: Run, options: Options, started: float) -> Reply:
        new, first = len(run.seq.new_tokens), (run.first_s or started) - started
        after = run.end_s - (run.first_s or run.end_s)
        fed = run.seq.num_prompt - run.cached
        return Reply(
            text=run.text,
            prompt_tokens=run.seq.num_prompt,
            new_tokens=new,
            first_token_s=round(first, 4),
            tokens_per_s=round((new - 1) / after, 3) if new > 1 and after > 0 else 0.0,
            prefill_tokens_per_s=round(fed / first, 3) if first > 0 else 0.0,
            peak_memory_bytes=peak_memory(),
            bytes_read=self.traffic.bytes_read,
            model=self.name,
            finish=run.seq.finish or "cancelled",
            options=options.to_json()
            | {"context": self.context, "threads": torch.get_num_threads()},
        )


def _messages(prompt: Prompt, system: str | None) -> Messages:
    said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    for message in said:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise OptionError(
                f"a message needs 'role' and 'content', this has neither: {message!r}"
            )
    return said if system is None else [{"role": "system", "content": system}, *said]


def _seeded(options: Options) -> Options:
    """With the seed that will be used, so that a result states it."""
    if options.seed is not None:
        return options
    return options.with_changes({"seed": int(torch.seed() & 0x7FFFFFFF)})


def load(
    model: str = DEFAULT_MODEL,
    *,
    context: int | None = None,
    threads: int | None = None,
    encoding: str = "auto",
    native: bool = True,
    quiet: bool = False,
) -> Model:
    """Open a model: a path, hf:org/repo[:file], or package:name==version[:file]; packed first if need
    be. `threads` sets torch's threads for the process. Raises OutsizeError."""
    if threads is not None:
        if not 1 <= threads <= 1024:
            raise OptionError(f"threads is {threads}; a whole number from 1 to 1,024 is expected")
        torch.set_num_threads(threads)
    made, traffic = pack(model, encoding=encoding, quiet=quiet), Traffic()
    compiled = kernels(store.home() / "native") if native else None
    longest = made.description.context
    if context is not None and not 2 <= context <= longest:
        raise ContextError(f"context is {context:,}; this model holds from 2 to {longest:,} tokens")
    grouped = [name for name in made.encodings if name.startswith("group")]
    if grouped and compiled is None and not quiet:
        warn(
            f"{made.path.name} holds {', '.join(grouped)}, which without compiled kernels runs about "
            "20 times slower; install a C compiler, or pack again with --encoding int8"
        )
    with bars(quiet) as progress:
        loaded = load_resident(made, compiled, traffic, progress)
    parts = loaded.embed, loaded.head, loaded.layers, loaded.final_norm
    transformer = Transformer(made.description, *parts, compiled)
    return Model(made, transformer, _tokens(made), context or longest, traffic)


def _tokens(made: Pack) -> Tokens:
    raw = (made.path / TOKENIZER).read_bytes()
    if zlib.crc32(raw) != made.tokenizer_crc:
        raise damaged(made.path, "its tokenizer does not match its checksum")
    return Tokens(Tokenizer.from_str(raw.decode()), made.bos, made.add_bos)
