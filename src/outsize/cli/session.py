"""A model opened for a person at a terminal: answers on stdout, everything else on stderr."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from outsize.cli.console import INTERRUPTED, is_unicode
from outsize.cli.flags import DisplayOptions
from outsize.cli.settings import no_color
from outsize.engine import load as loading
from outsize.engine.conversation import checked_overflow
from outsize.engine.learn import learn
from outsize.engine.model import Model
from outsize.engine.reply import Reply
from outsize.errors import OutsizeError
from outsize.log import say
from outsize.options import LoadOptions, Options
from outsize.pack.outline import Outline
from outsize.plan import make as planning
from outsize.plan.placement import Placement
from outsize.report import plan_text
from outsize.report.reply_text import summary
from outsize.text.channels import REASONING, TEXT, Piece


def open_model(name: str, load: LoadOptions, display: DisplayOptions) -> Model:
    """Open a model, and say what it takes before its weights are read. Raises OutsizeError."""
    checked_overflow(display.overflow)
    started = time.perf_counter()
    before = None if load.quiet or display.json else _announce
    model = loading.open_model(name, load, before=before)
    if display.verbose:
        pack = model.pack
        say(f"{pack.path}: {pack.size / 1e6:,.0f} MB as {', '.join(pack.encodings)}")
        kernels = model.transformer.backend.name
        say(f"opened in {time.perf_counter() - started:.2f} s; {kernels} row kernels")
    return model


def _announce(outline: Outline, placement: Placement) -> None:
    cost = planning.cost_if_known(outline, placement)
    say("\n".join(plan_text.short(outline, placement, cost)))


def answer(
    name: str, prompt: str, load: LoadOptions, request: Options, display: DisplayOptions
) -> None:
    """One prompt, one reply. Raises OutsizeError."""
    with open_model(name, load, display) as model:
        streaming = model.stream_from(prompt, request)
        with interrupts(streaming.cancel):
            show(streaming.parts, shown=not display.json, thinking=display.show_thinking)
        reply = streaming.reply
        learn(model, reply)
    if display.json:
        print(json.dumps(reply.to_json(), ensure_ascii=not is_unicode(sys.stdout)))
    elif not load.quiet:
        say(summary(reply, planning.disk_rate()))
        say_unanswered(reply)
    if reply.finish == "cancelled":
        sys.exit(INTERRUPTED)


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
                sys.stdout.write(_change(kind, styled))
            sys.stdout.write(piece)
            sys.stdout.flush()
            last, begun = kind, True
    except OutsizeError:
        shown = shown and begun  # a refusal is no empty answer
        raise
    finally:
        if shown:
            print(_change(TEXT, styled).rstrip("\n") if last == REASONING else "", flush=True)


def _change(kind: str, styled: bool) -> str:
    """What is written where thinking begins, or ends."""
    if kind == REASONING:
        return "\033[2m" if styled else "<think>\n"
    return "\033[0m\n\n" if styled else "\n</think>\n\n"


def say_unanswered(reply: Reply) -> None:
    """Say so where a model thought, and did not answer."""
    if reply.reasoning and not reply.text:
        say(
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
