"""Cache settings of experts, and the spec a user gives for them: `echo,prefetch=score:0.2,misses=fetch`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from outsize import registry
from outsize.caching import eviction, misses, prefetcher
from outsize.caching.misses import MissHandler, fetch
from outsize.caching.policy import Hints, Policy, make
from outsize.caching.prefetcher import Prefetcher, Scored
from outsize.errors import OptionError

DEFAULT = "echo"
REPLAYED = ("belady", "pin_and_ring")  # policies that a live run cannot have
PROFILED = "static"  # needs a profile of use, which only a replay has

# Given each layer's choices: layer, ids and weights by token, and what the next layer's gate says early.
Recorder = Callable[[int, Sequence[Sequence[int]], Sequence[Sequence[float]], Scored], None]


@dataclass(slots=True)
class CacheSettings:
    """How experts are cached, for all layers of a model; `uses` counts as it runs."""

    prefetcher: Prefetcher | None = None
    missing: MissHandler = fetch
    routing_bias: float = 0.0  # of resident experts, in ranges of the gate's logits (lossy)
    uses: Counter[int] = field(default_factory=Counter)
    recorder: Recorder | None = None


@dataclass(frozen=True, slots=True)
class ExpertOptions:
    """What a user may choose about the caching of experts. All defaults are exact."""

    eviction: str = DEFAULT
    prefetch: str = "none"
    misses: str = "fetch"
    routing: str = "native"
    ranked: Sequence[int] = ()  # for `static`: keys of the tables' records, the most used first
    recorder: Recorder | None = None

    @property
    def lossy(self) -> str:
        """What may change the model's answers; "" by default."""
        changed = [f"misses={self.misses}"] if self.misses != "fetch" else []
        return " and ".join(changed + ([f"routing={self.routing}"] if self.routing_bias else []))

    @property
    def is_lossy(self) -> bool:
        return bool(self.lossy)

    @property
    def copies(self) -> str:
        """The encoding of a second pack of the same experts, for misses; "" by default."""
        return misses.copies_of(self.misses)

    @property
    def routing_bias(self) -> float:
        """Of resident experts, in ranges of the gate's logits. Raises OptionError."""
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
        """An eviction policy for so many slots."""
        return make(self.eviction, capacity, hints)

    def settings(self, count: int) -> CacheSettings:
        """For layers of so many experts. Raises OptionError, UnsupportedError."""
        ahead = None if self.prefetch == "none" else prefetcher.make(self.prefetch, count)
        missing = misses.make(self.misses)
        return CacheSettings(ahead, missing, self.routing_bias, recorder=self.recorder)


def parse_experts(text: str) -> ExpertOptions:
    """Options from a spec. Raises OptionError, UnsupportedError."""
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
    made = replace(ExpertOptions(), **found)  # type: ignore[arg-type]
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
    registry.module(eviction, made.eviction, "policy")
    made.settings(1)  # refuses what is not known
    return made
