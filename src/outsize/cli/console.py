"""A command as a shell starts it: its streams, its arguments, and what ends it from outside."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer.core

from outsize.errors import DiskFullError, OptionError, OutsizeError
from outsize.system import address_space

INTERRUPTED, BROKEN_PIPE = 130, 141  # exit statuses, as shells give them for SIGINT and SIGPIPE


def prepare() -> None:
    """Make the streams take and give any text: a closed one is the null device, a character that the
    console does not know is shown as another, and bytes that are no text are kept for `text_of`. Raises
    OptionError where there is no working folder."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    try:
        os.getcwd()
    except OSError:
        raise OptionError(
            "the working folder is gone (removed, or on a disk that is); `cd` to one that is there"
        ) from None


def run(command: Callable[[], None], is_plain: Callable[[], bool]) -> None:
    """A command, to its end: an error is one sentence, and the exit status says of what kind; `is_plain`:
    without colour."""
    if said := address_space.refusal(sys.argv):
        sys.exit(f"error: {said}")
    try:
        prepare()
        command()
    except OutsizeError as e:
        plain = not sys.stderr.isatty() or is_plain()
        label = "error:" if plain else "\033[31merror:\033[0m"
        print(f"{label} {e}", file=sys.stderr)
        sys.exit(e.exit_status)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except (ImportError, OSError, MemoryError, RuntimeError) as e:
        if not (said := address_space.refusal(sys.argv, e)):
            raise
        sys.exit(f"error: {said}")


def text_of(said: str, encoding: str | None = None) -> str:
    """What was typed or piped. It is in the locale's encoding; where bytes are none in that, all are read as
    UTF-8, and each that is not becomes U+FFFD, which is said. A mark of the byte order is left out."""
    if not any("\udc80" <= c <= "\udcff" for c in said):
        return said.removeprefix("\ufeff")
    try:
        raw = said.encode(encoding or sys.getfilesystemencoding(), "surrogateescape")
    except UnicodeEncodeError:
        return said  # halves of pairs, which no bytes gave: refused where tokens are made
    text = raw.decode("utf-8", "replace").removeprefix("\ufeff")
    if lost := text.count("\ufffd"):
        print(f"warning: {lost} bytes of the text are not UTF-8: U+FFFD is read", file=sys.stderr)
    return text


def is_unicode(stream: object) -> bool:
    """Does a stream's encoding have all characters?"""
    return str(getattr(stream, "encoding", "")).lower().startswith("utf")


def arguments(given: Sequence[str], command: Any) -> list[str]:
    """The arguments of `command`, texts that begin with a dash put behind `--`, where no option is looked
    for."""
    known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
    valued = {name for p in command.params if not getattr(p, "is_flag", False) for name in p.opts}
    front: list[str] = []
    behind: list[str] = []
    rest = list(given)
    while rest:
        word = rest.pop(0)
        if word == "--":
            behind, rest = [*behind, *rest], []
        elif word in valued and word.startswith("-"):
            front, rest = [*front, word, *rest[:1]], rest[1:]
        elif _is_text(word, known) or (behind and not word.startswith("-")):
            behind.append(word)
        else:
            front.append(word)
    return [*front, "--", *behind] if behind else list(given)


def _is_text(word: str, known: set[str]) -> bool:
    """Begins with a dash, and is no option: anything but a letter after it, or a space in it."""
    if not word.startswith("-") or len(word) < 2:
        return False
    if word[1] != "-" and not word[1].isalpha():
        return True
    name, ends = (
        re.split(r"([\s=])", word, maxsplit=1)[:2] if re.search(r"\s", word) else (word, "=")
    )
    return not (ends == "=" or name in known or (name[1] != "-" and name[:2] in known))


class Commands(typer.core.TyperGroup):
    """The commands, ended in one line by an interrupt, a full disk, or a reader of their output that left."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args[:1] in (["--version"], ["-V"]):
            args = ["version"]
        if args[:1] == ["run"]:
            args = ["run", *arguments(args[1:], self.commands["run"])]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            made = super().invoke(ctx)
            sys.stdout.flush()
            return made
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)
        except OSError as e:
            silence()
            if e.errno == errno.EPIPE:
                sys.exit(BROKEN_PIPE)
            raise failure(e) from None


def silence() -> None:
    """What is still to be written goes nowhere: writing it has failed."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def failure(e: OSError) -> OutsizeError:
    """What the system refused, as a sentence."""
    kind = DiskFullError if e.errno == errno.ENOSPC else OutsizeError
    return kind(f"{e.filename or 'the output'} cannot be read or written: {e.strerror or e}")
