"""What a person at a terminal sees: answers on stdout, everything else on stderr."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from outsize import loading, planning
from outsize.api import Model
from outsize.checkpoint.source import names_model
from outsize.conversation import checked_overflow
from outsize.decode.channels import REASONING, TEXT, Piece
from outsize.errors import OptionError, PackError
from outsize.loading import Wishes
from outsize.options import DEFAULT_MODEL, Options
from outsize.pack.format import Pack
from outsize.pack.leftovers import Leftover
from outsize.pack.outline import Outline
from outsize.pack.store import home
from outsize.plan import report
from outsize.plan.placement import Placement
from outsize.reply import Reply
from outsize.settings import no_color


@dataclass(frozen=True, slots=True)
class How:
    """How to open a model and how to show what it does."""

    wishes: Wishes
    threads: int | None
    as_json: bool
    verbose: bool
    adapters: tuple[str, ...] = ()
    thinking: bool | None = None  # show what the model thinks; None: where a person looks on
    overflow: str = "error"


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


def open_model(name: str, how: How) -> Model:
    checked_overflow(how.overflow)
    started, w = time.perf_counter(), how.wishes
    model = loading.load(
        name,
        memory=w.memory,
        experts=w.experts,
        draft=w.draft,
        adapters=dict(named_adapters(how.adapters)),
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
        kernels = "native" if model.transformer.kernels is not None else "plain"
        note(f"opened in {time.perf_counter() - started:.2f} s; {kernels} row kernels")
    return model


def _announce(outline: Outline, placement: Placement) -> None:
    """The plan, short, before weights are read."""
    cost = planning.cost_if_known(outline, placement)
    note("\n".join(report.short(outline, placement, cost)))


def named_adapters(told: Sequence[str]) -> list[tuple[str, str]]:
    """NAME=PATH, split. Raises OptionError."""
    pairs = [(name, path) for name, _, path in (text.partition("=") for text in told)]
    for text, (name, path) in zip(told, pairs, strict=True):
        if not name or not path:
            raise OptionError(f"--adapter is {text!r}; NAME=PATH is expected")
    return pairs


def first_adapter(told: Sequence[str] | None) -> str | None:
    """The one to begin with."""
    return named_adapters(told)[0][0] if told else None


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def answer(name: str, prompt: str, options: Options, how: How) -> None:
    """One prompt, one reply."""
    with open_model(name, how) as model:
        streaming = model.stream(prompt, **options.to_json())  # type: ignore[arg-type]
        with interrupts(streaming.cancel):
            show(streaming.parts, shown=not how.as_json, thinking=how.thinking)
        reply = streaming.reply
    if how.as_json:
        print(json.dumps(reply.to_json(), ensure_ascii=False))
    elif not how.wishes.quiet:
        note(summary(reply, planning.disk_rate()))
        note_unanswered(reply)
    if reply.finish == "cancelled":
        sys.exit(130)


def show(parts: Iterator[Piece], shown: bool, thinking: bool | None = None) -> None:
    """Print a reply as it comes. What the model thinks is dim at a terminal; elsewhere it is left out, unless
    `thinking` says otherwise."""
    styled = sys.stdout.isatty() and not no_color()
    thinking = sys.stdout.isatty() if thinking is None else thinking
    last = TEXT
    try:
        for kind, piece in parts:
            if not shown or (kind == REASONING and not thinking):
                continue
            if kind != last:
                sys.stdout.write(_turn(kind, styled))
            sys.stdout.write(piece)
            sys.stdout.flush()
            last = kind
    finally:
        if shown:
            print(_turn(TEXT, styled).rstrip("\n") if last == REASONING else "", flush=True)


def _turn(kind: str, styled: bool) -> str:
    """What is written where thinking begins, or ends."""
    if kind == REASONING:
        return "\033[2m" if styled else "<think>\n"
    return "\033[0m\n\n" if styled else "\n</think>\n\n"


def note_unanswered(reply: Reply) -> None:
    """Say so where a model thought, and did not answer."""
    if reply.reasoning and not reply.text:
        note(
            f"the model thought ({len(reply.reasoning):,} characters) and gave no answer; "
            "--show-thinking shows it, -n allows a longer reply"
        )


def summary(reply: Reply, disk_bytes_per_s: float | None = None) -> str:
    """The closing line."""
    parts = [
        f"{reply.prompt_tokens} prompt tokens, first token after {reply.first_token_s:.2f} s",
        f"{reply.new_tokens} tokens at {reply.tokens_per_s:.1f}/s",
        f"peak memory {reply.peak_memory_bytes / 1e6:,.0f} of {reply.budget_bytes / 1e6:,.0f} MB, "
        f"read {reply.bytes_read / 1e6:,.0f} MB",
    ]
    if reply.drafted:
        parts.append(
            f"{reply.accepted} of {reply.drafted} guesses right, {reply.tokens_per_step:.2f} tokens a step"
        )
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
    kinds = ("ready", "late", "cold", "capacity", "collision", "dropped", "substituted", "copied")
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


def note_leftovers(found: Sequence[Leftover]) -> None:
    for one in found:
        note(
            f"{one.path.name}: {one.size / 1e6:,.0f} MB, left by a run that was ended; the next download "
            f"removes it, or `outsize rm {one.path.name}`"
        )


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
