"""Defaults of flags, from the environment and config.toml. Precedence: flag > environment > config.toml >
built-in."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import platformdirs
import typer

from outsize.errors import OptionError
from outsize.home import expanded
from outsize.options import near

NOT_FLAGS = (
    "OUTSIZE_HOME",
    "OUTSIZE_CONFIG",
    "OUTSIZE_SECRET",
    "OUTSIZE_MODELS",
    "OUTSIZE_SECRET",  # of ranks (parallel/secret.py)
)  # where tests find models

WORDS: dict[type, str] = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path",
    list: "a list of texts",
}  # fmt: skip


def no_color() -> bool:
    """https://no-color.org, or a terminal that knows no colours."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


def check_environment(app: typer.Typer) -> None:
    """Raises OptionError for a variable that would be a setting's, and is none's: a budget that is misspelled
    would not be kept."""
    flags = {p.envvar for c in _leaves(_commands(app)) for p in c.params}
    known = {*NOT_FLAGS, *filter(None, flags)}
    for name in os.environ:
        if name.startswith("OUTSIZE_") and name not in known:
            close = near(name, known)
            hint = f"did you mean {close}?" if close else "unset it"
            raise OptionError(
                f"{name} is set in the environment, and no setting is called so; {hint}"
            )


def end_by_exception() -> None:
    """TERM and HUP end the process as Ctrl-C does: what it began is cleaned up. Where they are ignored, as
    under nohup, they stay so."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no HUP
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda number, frame: sys.exit(128 + number))


def config_path() -> Path:
    """OUTSIZE_CONFIG, else the user's config folder."""
    chosen = os.environ.get("OUTSIZE_CONFIG")
    if chosen:
        return expanded(chosen)
    return Path(platformdirs.user_config_dir("outsize")) / "config.toml"


def default_map(app: typer.Typer) -> dict[str, Any]:
    """What config.toml says, for every command that has the flag. Raises OptionError."""
    path = config_path()
    if path.is_dir():
        raise OptionError(f"{path} is a folder; a file of settings is expected")
    if not path.is_file():
        return {}
    import tomllib

    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors put a mark before it
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise OptionError(f"{path} is not TOML: {e}") from None
    except OSError as e:
        raise OptionError(f"{path} cannot be read: {e.strerror}") from None
    values = {key.replace("-", "_"): value for key, value in values.items()}
    commands = _commands(app)
    known = kinds(commands)
    for key in values:
        if key not in known:
            close = near(key, known)
            hint = f"; did you mean {close!r}?" if close else ""
            raise OptionError(f"{path}: setting {key!r} is not known{hint}")
        values[key] = _value(path, key, values[key], known[key])
    return {name: _for(command, values) for name, command in commands.items()}


def kinds(commands: dict[str, Any]) -> dict[str, type]:
    """Of each setting, which is a flag's long name: bool, int, float, str, Path or list."""
    out: dict[str, type] = {}
    for command in _leaves(commands):
        hints = get_type_hints(command.callback)
        for name in (p.name for p in command.params if p.envvar):
            inner = [k for k in get_args(hints[name]) if k is not type(None)] or [hints[name]]
            out[name] = get_origin(inner[0]) or inner[0]
    return out


def _value(path: Path, key: str, value: object, kind: type) -> object:
    """A setting's value, if it is of its kind. Raises OptionError."""
    if kind is list and isinstance(value, str):
        return [value]
    good: dict[type, tuple[type, ...]] = {float: (int, float), str: (str, int, float), Path: (str,)}
    if not isinstance(value, good.get(kind, (kind,))) or isinstance(value, bool) != (kind is bool):
        raise OptionError(f"{path}: setting {key!r} is {value!r}; {WORDS[kind]} is expected")
    return value


def _commands(app: typer.Typer) -> dict[str, Any]:
    found: dict[str, Any] = getattr(typer.main.get_command(app), "commands", {})
    return found


def _leaves(commands: dict[str, Any]) -> list[Any]:
    return [x for c in commands.values() for x in (_leaves(c.commands) if _is_group(c) else [c])]


def _is_group(command: Any) -> bool:
    return bool(getattr(command, "commands", None))


def _for(command: Any, values: dict[str, Any]) -> dict[str, Any]:
    if _is_group(command):
        return {name: _for(inner, values) for name, inner in command.commands.items()}
    return {p.name: values[p.name] for p in command.params if p.name in values}
