"""What `--prefill` says: run a prompt in full, or let its less attended tokens skip the later layers
(LazyLLM, arXiv 2407.14057). Text -> settings; settings -> prune points of a model."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from outsize.errors import OptionError
from outsize.model_config import Description

MODES = ("revive", "once", "drop")
SCORES = ("last", "window", "layers")
MOST_WINDOW = 64  # rows
KEYS = ("keep", "after", "mode", "score", "mass")


@dataclass(frozen=True, slots=True)
class Prune:
    """After each of the shares `after` of the layers, only the share `keep` of a prompt's tokens goes on, or
    as many as hold the share `mass` of attention. The last `window` rows' attention chooses, averaged over
    the last `layers` layers. `mode`: "revive" what a later token attends to; prune "once", in the prompt; or
    "drop" what was pruned from all layers."""

    keep: tuple[float, ...] = (0.5, 0.25, 0.125)
    after: tuple[float, ...] = (0.15, 0.45, 0.75)
    mode: str = "once"
    window: int = 1
    layers: int = 1
    mass: float | None = None

    def check_drafts(self, kind: str) -> None:
        """Raise OptionError for a drafter that was asked for (by its kind), and would not be used."""
        if self.mode == "revive" and kind not in ("auto", "none"):
            raise OptionError(
                f"prefill with mode=revive looks anew at the prompt for each token, one by one, and "
                f"draft={kind} guesses several; use mode=once, or draft=none"
            )

    def check_layers(self, d: Description) -> None:
        """Raise OptionError for a model whose layers cannot be skipped."""
        if d.num_kv_layers < d.num_layers:
            count = d.num_layers - d.num_kv_layers
            raise OptionError(
                f"prefill=lazy lets tokens skip layers, and the last {count} of this model share keys and "
                "values, so that only a prompt's last token goes through them anyway; leave it out"
            )
        self.points(d.num_layers)

    def points(self, num_layers: int) -> dict[int, float]:
        """Prune points: layers done, and the share that goes on; where two fall together, the smaller. Raises
        OptionError for a model without a place to prune at."""
        if num_layers < 2:
            raise OptionError(
                f"prefill=lazy prunes between layers, and this model has {num_layers}; leave it out"
            )
        shares = self.keep if self.mass is None else (self.mass,) * len(self.after)
        out: dict[int, float] = {}
        for after, share in zip(self.after, shares, strict=True):
            at = min(num_layers - 1, max(1, round(after * num_layers)))
            if share < 1:
                out[at] = min(share, out.get(at, 1.0))
        return out


# Scored by 16 rows where the paper has one: the last token alone, early on, misses what counts (at one point
# after .3 of the layers KL .39 instead of 2.00; docs/results/prefill.md).
PRESETS = {
    "gentle": Prune(keep=(0.7, 0.5, 0.35), after=(0.3, 0.6, 0.9), window=16),
    "fast": Prune(keep=(0.5, 0.25, 0.125), after=(0.15, 0.45, 0.75), window=16),
}
DEFAULT = "gentle"


def parse_prefill(text: str) -> Prune | None:
    """None for "full". Raises OptionError."""
    kind, colon, rest = text.partition(":")
    if kind not in ("full", "lazy") or (colon and (kind == "full" or not rest)):
        raise OptionError(
            f"prefill is {text!r}; known are full, lazy, and lazy:SETTINGS with {', '.join(PRESETS)} or "
            f"{', '.join(f'{key}=' for key in KEYS)}"
        )
    if kind == "full":
        return None
    words = rest.split(",") if rest else []
    base = PRESETS[words.pop(0)] if words and words[0] in PRESETS else PRESETS[DEFAULT]
    told: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if key not in KEYS or not equals:
            raise OptionError(f"prefill is {text!r}: {_unknown(key, [*PRESETS, *KEYS])}")
        if key in told:
            raise OptionError(f"prefill is {text!r}: {key} is given twice; give it once")
        told[key] = value
    return _made(text, base, told)


def _made(text: str, base: Prune, told: Mapping[str, str]) -> Prune:
    if "keep" in told and "mass" in told:
        raise OptionError(
            f"prefill is {text!r}: keep and mass both say how many tokens go on; give one of them"
        )
    made = base
    if "score" in told:
        window, layers = _score(text, told["score"])
        made = replace(base, window=window, layers=layers)
    if "mode" in told:
        if told["mode"] not in MODES:
            raise OptionError(f"prefill is {text!r}: mode {_unknown(told['mode'], MODES)}")
        made = replace(made, mode=told["mode"])
    if "keep" in told:
        made = replace(made, keep=_shares(text, "keep", told["keep"]))
    if "after" in told:
        made = replace(made, after=_shares(text, "after", told["after"]))
    if "mass" in told:
        (mass,) = _shares(text, "mass", told["mass"], 1)
        return replace(made, mass=mass)
    if len(made.keep) != len(made.after):
        raise OptionError(
            f"prefill is {text!r}: keep has {len(made.keep)} shares and after has {len(made.after)} prune "
            "points; give as many of one as of the other"
        )
    if list(made.keep) != sorted(made.keep, reverse=True):
        raise OptionError(
            f"prefill is {text!r}: keep rises, and what was pruned does not come back at a later prune "
            "point; give shares that fall"
        )
    return made


def _score(text: str, value: str) -> tuple[int, int]:
    """Rows, and layers."""
    kind, colon, count = value.partition(":")
    if kind not in SCORES:
        raise OptionError(f"prefill is {text!r}: score {_unknown(kind, SCORES)}")
    if kind == "last" and not colon:
        return 1, 1
    most = MOST_WINDOW
    if kind == "last" or not (count.isdecimal() and 1 <= int(count[:9]) <= most):
        need = "no number" if kind == "last" else f"a whole number from 1 to {most}, as in {kind}:4"
        raise OptionError(f"prefill is {text!r}: score={value}; {kind} takes {need}")
    return (int(count), 1) if kind == "window" else (1, int(count))


def _shares(text: str, key: str, value: str, most: int = 64) -> tuple[float, ...]:
    """Numbers from 0 to 1, with a slash between them; those of prune points rise."""
    try:
        found = tuple(float(word) for word in value.split("/"))
    except ValueError:
        found = (math.nan,)
    if not all(0 < share <= 1 for share in found) or len(found) > most:
        raise OptionError(
            f"prefill is {text!r}: {key}={value}; shares above 0 and up to 1 are expected, as in {key}="
            + ("0.95" if most == 1 else ".5/.75")
        )
    if key == "after" and any(a >= b for a, b in pairwise(found)):
        raise OptionError(
            f"prefill is {text!r}: after={value}, and prune points come one after the other; give shares of "
            "the layers that rise"
        )
    return found


def _unknown(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{word!r} is not known; known are {', '.join(known)}{hint}"
