"""What a person at a terminal sees: answers on stdout, everything else on stderr."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from outsize import loading, planning
from outsize.api import Model
from outsize.checkpoint.source import names_model
from outsize.errors import OptionError, OutsizeError, PackError, TemplateError
from outsize.loading import Wishes
from outsize.options import DEFAULT_MODEL, Options
from outsize.pack.format import Pack
from outsize.pack.outline import Outline
from outsize.pack.store import home
from outsize.plan import report
from outsize.plan.placement import Placement
from outsize.reply import Reply


@dataclass(frozen=True, slots=True)
class How:
    """How to open a model and how to show what it does."""

    wishes: Wishes
    threads: int | None
    as_json: bool
    verbose: bool


def understand(arguments: Sequence[str], model: str | None) -> tuple[str, str | None]:
    """[MODEL] [PROMPT] -> a model and a prompt; no prompt means a chat."""
    words = list(arguments)
    if model is None and words and (len(words) == 2 or names_model(words[0])):
        model = words.pop(0)
    if len(words) > 1:
        raise OptionError(
            f"{len(words)} prompts given, one is expected; put the prompt in quotes, and the model "
            "before it or after -m"
        )
    prompt = words[0] if words else None
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        prompt = sys.stdin.read()
    return model or DEFAULT_MODEL, prompt


def _open(name: str, how: How) -> Model:
    started, w = time.perf_counter(), how.wishes
    model = loading.load(
        name,
        memory=w.memory,
        experts=w.experts,
        context=w.context,
        threads=how.threads,
        encoding=w.encoding,
        verify=w.verify,
        force=w.force,
        native=w.native,
        quiet=w.quiet,
        before=None if w.quiet or how.as_json else _announce,
    )
    if how.verbose:
        pack = model.pack
        note(f"{pack.path}: {pack.size / 1e6:,.0f} MB as {', '.join(pack.encodings)}")
        kernels = "native" if model.transformer.has_kernels else "plain"
        note(f"opened in {time.perf_counter() - started:.2f} s; {kernels} row kernels")
    return model


def _announce(outline: Outline, placement: Placement) -> None:
    """The plan, short, before weights are read."""
    cost = planning.cost_if_known(outline, placement)
    note("\n".join(report.short(outline, placement, cost)))


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def answer(name: str, prompt: str, options: Options, how: How) -> None:
    """One prompt, one reply."""
    with _open(name, how) as model:
        streaming = model.stream(prompt, **options.to_json())  # type: ignore[arg-type]
        with interrupts(streaming.cancel):
            _print(iter(streaming), shown=not how.as_json)
        reply = streaming.reply
    if how.as_json:
        print(json.dumps(reply.to_json(), ensure_ascii=False))
    elif not how.wishes.quiet:
        note(summary(reply, planning.disk_rate()))
    if reply.finish == "cancelled":
        sys.exit(130)


def _print(pieces: Iterator[str], shown: bool) -> None:
    for piece in pieces:
        if shown:
            sys.stdout.write(piece)
            sys.stdout.flush()
    if shown:
        print(flush=True)


def summary(reply: Reply, disk_bytes_per_s: float | None = None) -> str:
    """The closing line."""
    parts = [
        f"{reply.prompt_tokens} prompt tokens, first token after {reply.first_token_s:.2f} s",
        f"{reply.new_tokens} tokens at {reply.tokens_per_s:.1f}/s",
        f"peak memory {reply.peak_memory_bytes / 1e6:,.0f} of {reply.budget_bytes / 1e6:,.0f} MB, "
        f"read {reply.bytes_read / 1e6:,.0f} MB",
    ]
    if reply.experts is not None:
        parts.append(_experts(reply.experts))
    if reply.hit_rate < 1:
        rate = f"{reply.disk_bytes_per_s / 1e9:.2f} GB/s"
        if disk_bytes_per_s:
            rate += (
                f" ({reply.disk_bytes_per_s / disk_bytes_per_s:.0%} of the disk's measured rate)"
            )
        parts.append(
            f"{reply.bytes_per_token / 1e6:,.1f} MB a token from disk at {rate}, "
            f"hit rate {reply.hit_rate:.0%}, waited {reply.waited_s:.2f} s"
        )
    return f"[{'; '.join(parts)}]"


def _experts(counts: Mapping[str, float]) -> str:
    """What became of the requests for experts."""
    kinds = ("ready", "late", "cold", "capacity", "collision", "dropped", "substituted")
    said = ", ".join(f"{counts[k]:,.0f} {k}" for k in kinds if counts[k])
    asked = counts["hits"] + counts["misses"]
    share = counts["hits"] / asked if asked else 1.0
    return f"experts: {asked:,.0f} asked for, {share:.0%} in memory" + (
        f" ({said})" if said else ""
    )


@contextmanager
def interrupts(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C stops the reply; a second one quits."""
    count = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise KeyboardInterrupt
        stop()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


HELP = "/reset forgets, /system TEXT begins anew under it, /stats counts, /bye leaves"


def chat(name: str, options: Options, how: How) -> None:
    """Turns until /bye, Ctrl-D, or Ctrl-C at the prompt."""
    with _open(name, how) as model:
        if model.pack.chat_template is None:
            raise TemplateError(
                f"{model.name} has no chat template: it is a base model; "
                "use `outsize run` with a text to continue"
            )
        talk = Talk(model, options, how)
        if sys.stdin.isatty() and not how.wishes.quiet:
            note(f"{model.name}; {HELP}")
        with _history():
            while (line := _ask()) is not None:
                if not talk.turn(line.strip()):
                    break


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        if sys.stdin.isatty():
            note("")
        return None


@contextmanager
def _history() -> Iterator[None]:
    """Editing keys and earlier lines, where the platform has them."""
    path = home() / "history"
    try:
        import readline
    except ImportError:
        yield
        return
    with suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)


class Talk:
    """A chat at the terminal."""

    def __init__(self, model: Model, options: Options, how: How) -> None:
        self._how = how
        self._conversation = model.conversation(**options.to_json())  # type: ignore[arg-type]
        self._replies: list[Reply] = []

    def turn(self, line: str) -> bool:
        """One line typed; False to leave."""
        command, _, rest = line.partition(" ")
        if command in ("/bye", "/exit", "/quit"):
            return False
        if command == "/reset":
            self._conversation.reset()
        elif command == "/system":
            self._conversation.reset(rest or None)
        elif command == "/stats":
            self._stats()
        elif command.startswith("/"):
            note(HELP)
        elif line:
            self._say(line)
        return True

    def _say(self, line: str) -> None:
        try:
            pieces = self._conversation.say(line)
            with interrupts(self._conversation.cancel):
                _print(pieces, shown=True)
        except OutsizeError as e:
            note(f"error: {e}")
            return
        reply = self._conversation.reply
        self._replies.append(reply)
        if self._how.verbose:
            note(summary(reply, planning.disk_rate()))

    def _stats(self) -> None:
        for reply in self._replies[-1:]:
            note(summary(reply, planning.disk_rate()))
        new = sum(r.new_tokens for r in self._replies)
        note(f"{len(self._replies)} turns, {new} tokens answered")


def show_packs(packs: Sequence[Pack | PackError], as_json: bool) -> None:
    """A table of packs, or one JSON list."""
    if as_json:
        good = [p for p in packs if isinstance(p, Pack)]
        print(json.dumps([_describe(p) for p in good]))
        return
    if not packs:
        print(f"no packs in {home() / 'packs'}; `outsize run PROMPT` makes the first")
    for pack in packs:
        if isinstance(pack, PackError):
            note(f"error: {pack}")
        else:
            d = _describe(pack)
            print(f"{d['name']}  {pack.size / 1e6:,.0f} MB  {d['family']}  {d['encodings']}")


def _describe(pack: Pack) -> dict[str, object]:
    return {
        "name": pack.path.name,
        "path": str(Path(pack.path).resolve()),
        "bytes": pack.size,
        "family": pack.description.family,
        "encodings": ", ".join(pack.encodings),
        "source": pack.source.spec,
        "licence": pack.licence,
    }
