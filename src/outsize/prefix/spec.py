"""What `--prefix-cache` says: where keys and values of prompts are kept for prompts that begin alike."""

from __future__ import annotations

from dataclasses import dataclass

from outsize.errors import OptionError
from outsize.options import parse_size

KINDS = ("off", "memory", "disk")
DAILY = 20 * 10**9  # bytes that are written a day at most, unless the user says otherwise
FORM = "off, memory or disk[:SIZE][,writes=SIZE], as disk:20GB,writes=5GB"


@dataclass(frozen=True, slots=True)
class PrefixSpec:
    """Where prompts are kept, and how much of a disk that may take."""

    kind: str
    size: int | None = None  # bytes on disk at most; None: a tenth of what is free, at most 10 GB
    writes: int = DAILY  # bytes written a day at most


def parse_prefix(text: str | None) -> PrefixSpec:
    """None: memory. Raises OptionError."""
    if text is None:
        return PrefixSpec("memory")
    head, *rest = text.strip().split(",")
    kind, _, size = head.partition(":")
    if kind not in KINDS:
        raise OptionError(f"prefix_cache is {text!r}; known are {FORM}")
    if kind != "disk" and (size or rest):
        raise OptionError(f"prefix_cache is {text!r}; only disk takes sizes: give {FORM}")
    spec = PrefixSpec(kind, _size(size, "the size") if size else None)
    for item in rest:
        name, _, value = item.partition("=")
        if name != "writes":
            raise OptionError(f"prefix_cache has {item!r}; known is writes=SIZE, of bytes a day")
        spec = PrefixSpec(kind, spec.size, _size(value, "writes"))
    return spec


def _size(text: str, name: str) -> int:
    size = parse_size(text, f"{name} of prefix_cache")
    if size < 1:
        raise OptionError(f"{name} of prefix_cache is {text!r}; give more, or prefix_cache=off")
    return size
