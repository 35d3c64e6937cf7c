"""How experts are cached, as a user says it: `echo,prefetch=score:0.2,misses=fetch`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from outsize import registry
from outsize.caching import eviction, misses, prefetcher
from outsize.caching.policy import Hints, Policy, make
from outsize.errors import OptionError
from outsize.weights.experts import ExpertHandling, Recorder

DEFAULT = "echo"
REPLAYED = ("belady", "pin_and_ring")  # policies that a live run cannot have
PROFILED = "static"  # needs a profile of use, which only a replay has


@dataclass(frozen=True, slots=True)
class ExpertOptions:
    """The knobs. All defaults are exact."""

    eviction: str = DEFAULT
    prefetch: str = "none"
    misses: str = "fetch"
    routing: str = "native"
    ranked: Sequence[int] = ()  # for `static`: the most used first
    recorder: Recorder | None = None

    @property
    def lossy(self) -> str:
        """What may make the answer another than the model's own; nothing by default."""
        changed = [f"misses={self.misses}"] if self.misses != "fetch" else []
        return " and ".join(changed + ([f"routing={self.routing}"] if self.favour else []))

    @property
    def is_lossy(self) -> bool:
        return bool(self.lossy)

    @property
    def copies(self) -> str:
        """The encoding of a second table of the same experts, for misses; none by default."""
        return misses.copies_of(self.misses)

    @property
    def favour(self) -> float:
        """Of experts in memory when choosing. Raises OptionError."""
        name, _, text = self.routing.partition(":")
        if self.routing == "native":
            return 0.0
        try:
            amount = float(text or "0.1")
        except ValueError:
            amount = -1.0
        if name != "cached" or not 0 <= amount <= 1:
            raise OptionError(
                f"routing {self.routing!r}: native or cached:AMOUNT (from 0 to 1) is expected"
            )
        return amount

    def policy(self, capacity: int, hints: Hints) -> Policy:
        """What decides which stay."""
        return make(self.eviction, capacity, hints)

    def handling(self, count: int) -> ExpertHandling:
        ahead = None if self.prefetch == "none" else prefetcher.make(self.prefetch, count)
        missing = misses.make(self.misses)
        return ExpertHandling(ahead, missing, self.favour, recorder=self.recorder)


def parse_experts(text: str) -> ExpertOptions:
    """Raises OptionError, UnsupportedError."""
    known = {"eviction", "prefetch", "misses", "routing"}
    found: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, is_named, value = part.rpartition("=")
        key = key if is_named else "eviction"
        if key not in known or key in found:
            raise OptionError(
                f"experts {text!r}: POLICY, prefetch=..., misses=... and routing=..., each once, are expected"
            )
        found[key] = value
    plain = ExpertOptions()
    made = ExpertOptions(
        found.get("eviction", plain.eviction),
        found.get("prefetch", plain.prefetch),
        found.get("misses", plain.misses),
        found.get("routing", plain.routing),
    )
    if made.eviction in REPLAYED:
        raise OptionError(
            f"experts {text!r}: {made.eviction} needs to know the future; use it in a replay"
        )
    if made.eviction == PROFILED:
        raise OptionError(
            f"experts {text!r}: static keeps the most used of a profile, and a run has none; use it "
            "in a replay"
        )
    if made.prefetch.startswith("oracle"):
        raise OptionError(f"experts {text!r}: oracle needs to know the future; use it in a replay")
    registry.module(eviction, made.eviction, "policy", registry.names(eviction))
    made.handling(1)  # refuses what is not known
    return made
