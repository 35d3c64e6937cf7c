"""Is the base that an adapter names another model than the one it is loaded over? Names are free text (a
path of whoever trained it, another organisation, a quantization), so only what both say is compared: a family
and its version, a size, a speciality. What one of them does not say tells nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

FAMILIES = (
    "tinyllama", "codellama", "llama", "qwen", "gemma", "mixtral", "mistral", "olmoe", "olmo", "smollm",
    "phi", "gptoss", "falcon", "granite", "deepseek", "stablelm", "pythia", "bloom", "yi", "opt",
)  # fmt: skip
SPECIAL = ("coder", "code", "math", "vision", "vl", "guard", "embedding", "omni", "audio")
SIZE = re.compile(r"(?<![a-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([mb])(?![a-z0-9])")
VERSION = r"(?:[-_ ]?v?(\d+(?:[._]\d+)?)(?![\d.]*[mb](?![a-z])))?"  # a number that is no size
NEAR = 0.15  # sizes are rounded as their makers like


def named(name: str) -> str:
    """What may name a model: the last part of a path, of hf:org/repo or package:name==version."""
    body = name.strip().rstrip("/\\").removeprefix("package:").partition("==")[0].lower()
    if body.startswith("hf:"):
        body = body[3:].partition(":")[0]
    return re.split(r"[/\\]", body)[-1].replace("gpt-oss", "gptoss")


def families(name: str) -> dict[str, str]:
    """Families, each with its version without dots, or "" where none is said."""
    found = {}
    for family in FAMILIES:
        match = re.search(rf"(?<![a-z]){family}{VERSION}(?![a-z])", name)
        if match is not None:
            found[family] = re.sub(r"\D", "", match.group(1) or "")
    return found


def sizes(name: str) -> list[float]:
    """In parameters."""
    found = SIZE.findall(name)
    return [int(n or 1) * float(x) * {"m": 1e6, "b": 1e9}[unit] for n, x, unit in found]


def is_other(base: str, ours: str) -> bool:
    """Do two names say clearly that they are of different models?"""
    a, b = named(base), named(ours)
    kin_a, kin_b = families(a), families(b)
    shared = kin_a.keys() & kin_b.keys()
    if kin_a and kin_b and not shared:
        return True
    if any(kin_a[f] and kin_b[f] and kin_a[f] != kin_b[f] for f in shared):
        return True
    size_a, size_b = sizes(a), sizes(b)
    if size_a and size_b and not any(_near(x, y) for x in size_a for y in size_b):
        return True
    return bool(shared) and _special(a) != _special(b)


def are_other(base: str, ours: Iterable[str]) -> bool:
    """Does every name of ours that could tell say so?"""
    telling = [name for name in ours if families(named(name)) or sizes(named(name))]
    return bool(telling) and all(is_other(base, name) for name in telling)


def _near(x: float, y: float) -> bool:
    return abs(x - y) <= NEAR * max(x, y)


def _special(name: str) -> set[str]:
    return set(SPECIAL) & set(re.split(r"[^a-z]+", name))
