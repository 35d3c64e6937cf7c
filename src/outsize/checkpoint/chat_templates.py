"""Chat templates: which ones a checkpoint has, by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from outsize.checkpoint.bounded import read_regular
from outsize.checkpoint.file_names import MORE_TEMPLATES
from outsize.checkpoint.read_json import optional_json
from outsize.errors import CheckpointError

MAX_TEMPLATE = 256 << 10  # bytes or characters; the longest published one has 30,000


def of_folder(folder: Path, settings: Mapping[str, object]) -> dict[str, str]:
    """Chat templates by name; files of their own come before what tokenizer_config.json says."""
    path = folder / "chat_template.jinja"
    files = {"default": path} if path.is_file() else {}
    files |= {p.stem: p for p in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    if files:
        return {name: _read_template(p) for name, p in files.items()}
    stated, where = settings.get("chat_template"), "tokenizer_config.json"
    if stated is None:
        stated, where = (
            optional_json(folder / "chat_template.json").get("chat_template"),
            "chat_template.json",
        )
    return _named(stated, where)


def _read_template(path: Path) -> str:
    return read_regular(path, MAX_TEMPLATE).decode("utf-8", "replace")


def _named(value: object, where: str) -> dict[str, str]:
    """One template, or a list of {"name", "template"}, by name. Raises CheckpointError."""
    if value is None:
        return {}
    items = [{"name": "default", "template": value}] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(v, dict) for v in items):
        raise CheckpointError(
            f"{where}: 'chat_template' is {str(value)[:80]!r}; a text, or a list of names with templates, "
            "is expected"
        )
    pairs = [(v.get("name"), v.get("template")) for v in items]
    return _bounded({n: t for n, t in pairs if isinstance(n, str) and isinstance(t, str)}, where)


def _bounded(templates: dict[str, str], where: str) -> dict[str, str]:
    for name, text in templates.items():
        if len(text) > MAX_TEMPLATE:
            raise CheckpointError(
                f"{where}: chat template {name[:80]!r} has {len(text):,} characters, at most "
                f"{MAX_TEMPLATE:,} are rendered; shorten or remove it"
            )
    return templates


def of_gguf(head: Mapping[str, object]) -> dict[str, str]:
    key = "tokenizer.chat_template"
    found = {
        k.removeprefix(key + "."): v
        for k, v in head.items()
        if k.startswith(key + ".") and isinstance(v, str)
    }
    default = head.get(key)
    found |= {"default": default} if isinstance(default, str) else {}
    return _bounded(found, "tokenizer.chat_template")
