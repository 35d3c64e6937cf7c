"""A chat at the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from outsize.cli import console
from outsize.cli.run import DisplayOptions, interrupts, note, note_unanswered, open_model, show
from outsize.engine.conversation import Conversation, checked_overflow
from outsize.engine.learn import learn
from outsize.engine.model import Model
from outsize.engine.reply import Reply
from outsize.errors import OutsizeError, TemplateError
from outsize.home import home
from outsize.options import Options
from outsize.plan import make as planning
from outsize.report.reply_text import summary

HELP = (
    "/reset forgets, /system TEXT begins anew under it (without TEXT, under none), "
    "/overflow drop-oldest lets old turns go, "
    "/adapter NAME swaps it, /stats counts, /bye leaves"
)


def chat(name: str, options: Options, how: DisplayOptions) -> None:
    """Turns until /bye, Ctrl-D, or Ctrl-C at the prompt."""
    with open_model(name, how) as model:
        if not model.pack.chat_templates:
            raise TemplateError(
                f"{model.name} has no chat template: it is a base model; "
                "use `outsize run` with a text to continue"
            )
        talk = Talk(model, options, how)
        if sys.stdin.isatty() and not how.load_options.quiet:
            note(f"{model.name}; {HELP}")
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

    def __init__(self, model: Model, options: Options, how: DisplayOptions) -> None:
        self._how, self._model = how, model
        self._conversation = Conversation(model, options, how.overflow)
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
            note(HELP)
        elif line:
            self._say(line)
        return True

    def _say(self, line: str) -> None:
        try:
            parts = self._conversation.parts(line)
            with interrupts(self._conversation.cancel):
                show(parts, shown=True, thinking=self._how.thinking)
        except OutsizeError as e:
            note(f"error: {e}")
            return
        reply = self._conversation.reply
        self._replies.append(reply)
        learn(self._model, reply)
        if self._conversation.dropped:
            note(f"the context was full: {self._conversation.dropped} old messages were let go")
        note_unanswered(reply)
        if self._how.verbose:
            note(summary(reply, planning.disk_rate()))

    def _set_overflow(self, told: str) -> None:
        try:
            self._conversation.overflow = checked_overflow(told.strip())
        except OutsizeError as e:
            note(f"error: {e}")

    def _stats(self) -> None:
        for reply in self._replies[-1:]:
            note(summary(reply, planning.disk_rate()))
        new = sum(r.new_tokens for r in self._replies)
        note(f"{len(self._replies)} turns, {new} tokens answered")
