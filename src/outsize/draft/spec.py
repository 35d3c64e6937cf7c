"""`--draft`, read from text: `kind[:source][:key=value,...]`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from outsize.draft.auto import MOST
from outsize.draft.mtp import LAYOUTS
from outsize.errors import OptionError

KINDS = ("auto", "none", "ngram", "model", "masks")
CHECKS = ("pick", "rejection")  # how guesses are checked
KEYS = {"ngram": ("k",), "model": ("k", "verify"), "masks": ("k", "layout")}


@dataclass(frozen=True, slots=True)
class DraftSpec:
    """`kind[:source][:key=value,...]`, understood."""

    kind: str
    source: str = ""
    k: int = 0  # 0: the kind's own
    layout: str = "quadratic"
    verify: str = "pick"


def parse_draft(text: str) -> DraftSpec:
    """Raises OptionError."""
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        raise OptionError(f"draft is {text!r}; known are {', '.join(KINDS)} (as in ngram:k=8)")
    match = re.fullmatch(r"(?:(.*?):)?(\w+=[^:,]+(?:,\w+=[^:,]+)*)", rest)
    source, pairs = (match.group(1) or "", match.group(2)) if match else (rest, "")
    told = dict(pair.split("=", 1) for pair in pairs.split(",") if pair)
    spec = DraftSpec(kind, source, *_told(text, kind, told))
    if bool(source) != (kind in ("model", "masks")):
        need = "a path, as in masks:FILE" if kind in ("model", "masks") else f"no path: {kind}"
        raise OptionError(f"draft is {text!r}; {kind} takes {need}")
    return spec


def _told(text: str, kind: str, told: Mapping[str, str]) -> tuple[int, str, str]:
    """k, layout, verify. Raises OptionError."""
    allowed = KEYS.get(kind, ())
    unknown = sorted(told.keys() - set(allowed))
    if unknown:
        known = ", ".join(sorted(allowed)) or "nothing"
        raise OptionError(f"draft is {text!r}: {unknown[0]} is not known; {kind} takes {known}")
    k, words = told.get("k", ""), {"layout": LAYOUTS, "verify": CHECKS}
    if k and not (k.isdecimal() and 1 <= int(k) <= MOST):
        raise OptionError(
            f"draft is {text!r}: k is {k}; a whole number from 1 to {MOST} is expected"
        )
    for name, known_words in words.items():
        if told.get(name, known_words[0]) not in known_words:
            expected = ", ".join(known_words)
            raise OptionError(f"draft is {text!r}: {name} is {told[name]}; known are {expected}")
    return int(k or 0), told.get("layout", LAYOUTS[0]), told.get("verify", CHECKS[0])
