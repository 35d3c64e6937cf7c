"""What a person at a terminal sees: answers on stdout, everything else on stderr."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from outsize.checkpoint.spec import holds_model, names_model
from outsize.cli import console
from outsize.cli.settings import no_color
from outsize.engine import load as loading
from outsize.engine.conversation import checked_overflow
from outsize.engine.learn import learn
from outsize.engine.model import Model
from outsize.engine.reply import Reply
from outsize.errors import OptionError, OutsizeError, PackError
from outsize.home import home
from outsize.options import DEFAULT_MODEL, LoadOptions, Options
from outsize.pack.format import Pack
from outsize.pack.leftovers import Leftover
from outsize.pack.outline import Outline
from outsize.plan import make as planning
from outsize.plan.placement import Placement
from outsize.report import plan_text
from outsize.report.reply_text import summary
from outsize.text.channels import REASONING, TEXT, Piece


@dataclass(frozen=True, slots=True)
class DisplayOptions:
    """How to open a model and how to show what it does."""

    load_options: LoadOptions
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
        if len(words) == 1 and not holds_model(words[0]):
            raise OptionError(
                f"{words[0]!r} is there, and no model; if it is a prompt, name a model before it or after -m"
            )
        model = words.pop(0)
    if len(words) > 1:
        raise OptionError(
            f"{len(words)} prompts given, one is expected; put the prompt in quotes, and the model "
            "before it or after -m"
        )
    prompt = words[0] if words else None
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        prompt = console.text_of(sys.stdin.read(), sys.stdin.encoding)
        if not prompt.strip():
            raise OptionError(
                "standard input holds no prompt; give one, in quotes or through a pipe"
            )
    if prompt is not None and not prompt.strip():
        raise OptionError("the prompt is blank; give one in quotes, or none for a chat")
    return model or DEFAULT_MODEL, None if prompt is None else console.text_of(prompt)


def readable(options: Options, told: Collection[str]) -> Options:
    """Options whose texts are text, and are used. Raises OptionError."""
    options.check_told(told)
    system = None if options.system is None else console.text_of(options.system)
    return replace(options, system=system, stop=tuple(map(console.text_of, options.stop)))


CHAT_ONLY, PROMPT_ONLY = ("overflow",), ("raw", "special", "as_json")


def check_use(told: Collection[str], how: DisplayOptions, prompt: bool) -> None:
    """Is each flag that was given of use for a prompt, or for a chat? Raises OptionError."""
    for name in CHAT_ONLY if prompt else PROMPT_ONLY:
        if name in told:
            flag, other = name.removeprefix("as_"), "a chat" if prompt else "a prompt"
            raise OptionError(f"--{flag} is for {other}; leave it out, or give {other}")
    if "adapter" in told and prompt and len(how.adapters) > 1:
        raise OptionError(
            f"--adapter is given {len(how.adapters)} times, and one prompt is answered with one; give one"
        )
    if "show_thinking" in told and how.as_json and how.thinking is False:
        raise OptionError(
            "--json tells what the model thought, under `reasoning`; leave --hide-thinking out"
        )


def load_options_of(told: Collection[str], *load_options: Any) -> LoadOptions:
    """LoadOptions, of which those that are not on the command line itself are defaults."""
    names = (
        "memory",
        "context",
        "encoding",
        "verify",
        "force",
        "native",
        "quiet",
        "experts",
        "draft",
        "adapters",
    )
    given = dict(zip(names, load_options, strict=False))
    return LoadOptions(defaults=frozenset({"encoding", "experts"} - set(told)), **given)


def open_model(name: str, how: DisplayOptions) -> Model:
    checked_overflow(how.overflow)
    started, w = time.perf_counter(), how.load_options
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
        defaults=w.defaults,
        before=None if w.quiet or how.as_json else _announce,
    )
    if how.verbose:
        pack = model.pack
        note(f"{pack.path}: {pack.size / 1e6:,.0f} MB as {', '.join(pack.encodings)}")
        note(
            f"opened in {time.perf_counter() - started:.2f} s; {model.transformer.backend.name} row kernels"
        )
    return model


def _announce(outline: Outline, placement: Placement) -> None:
    """The plan, short, before weights are read."""
    cost = planning.cost_if_known(outline, placement)
    note("\n".join(plan_text.short(outline, placement, cost)))


def named_adapters(told: Sequence[str]) -> list[tuple[str, str]]:
    """NAME=PATH, split. Raises OptionError."""
    pairs = [(name, path) for name, _, path in (text.partition("=") for text in told)]
    for text, (name, path) in zip(told, pairs, strict=True):
        if not name or not path:
            raise OptionError(f"--adapter is {text!r}; NAME=PATH is expected")
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise OptionError(f"--adapter names {twice!r} twice; give each a name of its own")
    return pairs


def first_adapter(told: Sequence[str] | None) -> str | None:
    """The one to begin with."""
    return named_adapters(told)[0][0] if told else None


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def answer(name: str, prompt: str, options: Options, how: DisplayOptions) -> None:
    """One prompt, one reply."""
    with open_model(name, how) as model:
        streaming = model.stream_from(prompt, options)
        with interrupts(streaming.cancel):
            show(streaming.parts, shown=not how.as_json, thinking=how.thinking)
        reply = streaming.reply
        learn(model, reply)
    if how.as_json:
        print(json.dumps(reply.to_json(), ensure_ascii=not console.is_unicode(sys.stdout)))
    elif not how.load_options.quiet:
        note(summary(reply, planning.disk_rate()))
        note_unanswered(reply)
    if reply.finish == "cancelled":
        sys.exit(130)


def show(parts: Iterator[Piece], shown: bool, thinking: bool | None = None) -> None:
    """Print a reply as it comes. What the model thinks is dim at a terminal; elsewhere it is left out, unless
    `thinking` says otherwise."""
    styled = sys.stdout.isatty() and not no_color()
    thinking = sys.stdout.isatty() if thinking is None else thinking
    last, begun = TEXT, False
    try:
        for kind, piece in parts:
            if not shown or (kind == REASONING and not thinking):
                continue
            if kind != last:
                sys.stdout.write(_turn(kind, styled))
            sys.stdout.write(piece)
            sys.stdout.flush()
            last, begun = kind, True
    except OutsizeError:
        shown = shown and begun  # a refusal is no empty answer
        raise
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
