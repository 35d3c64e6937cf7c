"""`--draft`, read from text: `kind[:source][:key=value,...]`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from outsize.draft.drafter import MOST
from outsize.errors import OptionError
from outsize.model.width import AUTO, parse_width

KINDS = ("auto", "none", "ngram", "model", "mtp", "native", "nested")
ALIASES = {"masks": "mtp"}  # earlier names
KEYS = {
    "ngram": ("k",), "model": ("k", "verify"), "mtp": ("k", "layout"), "native": ("k",), "nested": ("k",),
}  # fmt: skip
# Values that are words; the first is the default.
WORDS = {"layout": ("quadratic", "linear"), "verify": ("pick", "rejection")}


@dataclass(frozen=True, slots=True)
class DraftSpec:
    """`kind[:source][:key=value,...]`, understood."""

    kind: str
    source: str = ""
    k: int = 0  # 0: the kind's own
    layout: str = "quadratic"
    verify: str = "pick"


def parse_draft(text: str) -> DraftSpec:
    """The specification that `text` states. Raises OptionError."""
    kind, _, rest = text.partition(":")
    kind = ALIASES.get(kind, kind)
    if kind not in KINDS:
        raise OptionError(f"draft is {text!r}; known are {', '.join(KINDS)} (as in ngram:k=8)")
    match = re.fullmatch(r"(?:(.*?):)?(\w+=[^:,]+(?:,\w+=[^:,]+)*)", rest)
    source, pairs = (match.group(1) or "", match.group(2)) if match else (rest, "")
    told = dict(pair.split("=", 1) for pair in pairs.split(",") if pair)
    spec = DraftSpec(kind, source, *_values(text, kind, told))
    if kind == "nested":
        _check_width(text, source)
    elif bool(source) != (kind in ("model", "mtp")):
        need = f"no path: {kind}" if source else f"a path, as in {kind}:FILE"
        raise OptionError(f"draft is {text!r}; {kind} takes {need}")
    return spec


def _check_width(text: str, source: str) -> None:
    """A drafter is narrower than what it drafts for. Raises OptionError."""
    found: str | float = AUTO
    with suppress(OptionError):
        found = parse_width(source)
    if source and found in (1.0, AUTO):
        raise OptionError(
            f"draft is {text!r}; a share of the feed-forwards below 1 is expected, as in nested:0.25"
        )


def _values(text: str, kind: str, told: Mapping[str, str]) -> tuple[int, str, str]:
    """k, layout, verify. Raises OptionError."""
    allowed = KEYS.get(kind, ())
    if unknown := sorted(told.keys() - set(allowed)):
        known = ", ".join(sorted(allowed)) or "nothing"
        raise OptionError(f"draft is {text!r}: {unknown[0]} is not known; {kind} takes {known}")
    k, out = told.get("k", ""), {}
    if k and not (k.isdecimal() and 1 <= int(k) <= MOST):
        raise OptionError(
            f"draft is {text!r}: k is {k}; a whole number from 1 to {MOST} is expected"
        )
    for name, words in WORDS.items():
        out[name] = told.get(name, words[0])
        if out[name] not in words:
            known = ", ".join(words)
            raise OptionError(f"draft is {text!r}: {name} is {out[name]}; known are {known}")
    return int(k or 0), out["layout"], out["verify"]
