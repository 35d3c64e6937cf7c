"""A chat at the terminal: its turns, and the commands that begin with a slash."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from outsize.cli import console
from outsize.cli.flags import DisplayOptions
from outsize.cli.session import interrupts, open_model, say_unanswered, show
from outsize.engine.conversation import Conversation, checked_overflow
from outsize.engine.learn import learn
from outsize.engine.model import Model
from outsize.engine.reply import Reply
from outsize.errors import OutsizeError, TemplateError
from outsize.home import home
from outsize.log import say
from outsize.options import LoadOptions, Options
from outsize.plan import make as planning
from outsize.report.reply_text import summary

HELP = (
    "/reset forgets, /system TEXT begins anew under it (without TEXT, under none), "
    "/overflow drop-oldest lets old turns go, "
    "/adapter NAME swaps it, /stats counts, /bye leaves"
)


def chat(name: str, load: LoadOptions, request: Options, display: DisplayOptions) -> None:
    """Turns until /bye, Ctrl-D, or Ctrl-C at the prompt. Raises OutsizeError."""
    with open_model(name, load, display) as model:
        if not model.pack.chat_templates:
            raise TemplateError(
                f"{model.name} has no chat template: it is a base model; "
                "use `outsize run` with a text to continue"
            )
        talk = Talk(model, request, display)
        if sys.stdin.isatty() and not load.quiet:
            say(f"{model.name}; {HELP}")
        with _history():
            while (line := _ask()) is not None:
                if not talk.turn(line.strip()):
                    break


def _ask() -> str | None:
    try:
        said = input("> " if sys.stdin.isatty() else "")
        return console.text_of(said, sys.stdin.encoding)
    except (EOFError, KeyboardInterrupt):
        if sys.stdin.isatty():
            say("")
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
    """The conversation, and the replies so far."""

    def __init__(self, model: Model, request: Options, display: DisplayOptions) -> None:
        self._display, self._model = display, model
        self._conversation = Conversation(model, request, display.overflow)
        self._replies: list[Reply] = []

    def turn(self, line: str) -> bool:
        """One line typed; False to leave."""
        command, _, rest = line.partition(" ")
        if command in ("/bye", "/exit", "/quit"):
            return False
        if command == "/reset":
            self._conversation.reset()
        elif command == "/system":
            self._conversation.reset(rest)
        elif command == "/overflow":
            self._set_overflow(rest)
        elif command == "/adapter":
            self._conversation.options = self._conversation.options.with_changes(
                {"adapter": rest or None}
            )
        elif command == "/stats":
            self._stats()
        elif command.startswith("/"):
            say(HELP)
        elif line:
            self._say(line)
        return True

    def _say(self, line: str) -> None:
        try:
            parts = self._conversation.parts(line)
            with interrupts(self._conversation.cancel):
                show(parts, shown=True, thinking=self._display.show_thinking)
        except OutsizeError as e:
            say(f"error: {e}")
            return
        reply = self._conversation.reply
        self._replies.append(reply)
        learn(self._model, reply)
        if self._conversation.dropped:
            say(f"the context was full: {self._conversation.dropped} old messages were let go")
        say_unanswered(reply)
        if self._display.verbose:
            say(summary(reply, planning.disk_rate()))

    def _set_overflow(self, given: str) -> None:
        try:
            self._conversation.overflow = checked_overflow(given.strip())
        except OutsizeError as e:
            say(f"error: {e}")

    def _stats(self) -> None:
        for reply in self._replies[-1:]:
            say(summary(reply, planning.disk_rate()))
        new = sum(r.new_tokens for r in self._replies)
        say(f"{len(self._replies)} turns, {new} tokens answered")
