"""How a user says which neurons are computed: `off`, `auto` or a file, the eviction policy of their cache,
and whether what is in that cache is computed, too: `FILE,eviction=window,mode=resident`."""

from __future__ import annotations

from dataclasses import dataclass

from outsize import registry
from outsize.caching import eviction
from outsize.errors import OptionError
from outsize.weights.spec import PROFILED, REPLAYED

OFF, AUTO = "off", "auto"
DEFAULT = "lfu"  # eviction policy
# Of chunks, which are nearly the same for every token: among equals lfu puts out what is asked for next.
OF_CHUNKS = "window"
PREDICTED, RESIDENT = "predicted", "resident"  # modes
KEYS = ("eviction", "mode")


@dataclass(frozen=True, slots=True)
class NeuronSpec:
    """`file`: an add-on file's path, AUTO for the one beside the pack where that pays, or OFF. `mode`: what
    is predicted is computed, or also what is in memory anyway: then answers depend on what was before.
    `eviction`: "" where nothing was said, and the file decides."""

    file: str = OFF
    eviction: str = ""
    mode: str = PREDICTED


def parse_neurons(text: str) -> NeuronSpec:
    """Raises OptionError, UnsupportedError."""
    file, said = _split(text)
    if not file:
        raise OptionError(
            f"neurons {text!r}: off, auto or a file is expected, as FILE[,eviction=POLICY][,mode=MODE]"
        )
    if file == OFF and said:
        raise OptionError(f"neurons {text!r}: with off nothing is paged; leave the rest out")
    policy, mode = said.get("eviction", ""), said.get("mode", PREDICTED)
    if policy in (*REPLAYED, PROFILED):
        raise OptionError(
            f"neurons {text!r}: {policy} needs to know the future, or a profile; use it in a replay"
        )
    registry.module(eviction, policy or DEFAULT, "policy")
    if mode not in (PREDICTED, RESIDENT):
        raise OptionError(f"neurons {text!r}: mode is {PREDICTED} or {RESIDENT}, not {mode!r}")
    return NeuronSpec(file, policy, mode)


def _split(text: str) -> tuple[str, dict[str, str]]:
    """The file, and what follows it. Raises OptionError for what is said twice."""
    said: dict[str, str] = {}
    while True:
        before, comma, last = text.rpartition(",")
        key, equals, value = last.partition("=")
        if not comma or not equals or key not in KEYS:
            return text, said
        if key in said:
            raise OptionError(f"neurons says {key} twice; leave one out")
        text, said[key] = before, value
