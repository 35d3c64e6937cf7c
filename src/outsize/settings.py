"""config.toml: defaults of flags. Precedence: flag > environment > config.toml > built-in."""

from __future__ import annotations

import difflib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import typer

from outsize.errors import OptionError


def no_color() -> bool:
    """https://no-color.org"""
    return bool(os.environ.get("NO_COLOR"))


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
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_config_dir("outsize")) / "config.toml"


def default_map(app: typer.Typer) -> dict[str, Any]:
    """What config.toml says, for every command that has the flag. Raises OptionError."""
    path = config_path()
    if not path.is_file():
        return {}
    import tomllib

    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise OptionError(f"{path} is not TOML: {e}") from None
    values = {key.replace("-", "_"): value for key, value in values.items()}
    group = typer.main.get_command(app)
    commands = getattr(group, "commands", {})
    known = {p.name for c in _leaves(commands) for p in c.params if p.name}
    for key in values:
        name = "as_json" if key == "json" else key
        if name not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise OptionError(f"{path}: setting {key!r} is not known{hint}")
    if "json" in values:
        values["as_json"] = values.pop("json")
    return {name: _for(command, values) for name, command in commands.items()}


def _leaves(commands: dict[str, Any]) -> list[Any]:
    return [x for c in commands.values() for x in (_leaves(c.commands) if _is_group(c) else [c])]


def _is_group(command: Any) -> bool:
    return bool(getattr(command, "commands", None))


def _for(command: Any, values: dict[str, Any]) -> dict[str, Any]:
    if _is_group(command):
        return {name: _for(inner, values) for name, inner in command.commands.items()}
    return {p.name: values[p.name] for p in command.params if p.name in values}
