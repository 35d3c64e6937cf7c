"""How a user says which neurons are computed: `off`, `auto` or a file, and the eviction policy of their
cache: `FILE,eviction=window`."""

from __future__ import annotations

from dataclasses import dataclass

from outsize import registry
from outsize.caching import eviction
from outsize.errors import OptionError
from outsize.weights.spec import PROFILED, REPLAYED

OFF, AUTO = "off", "auto"
DEFAULT = "lfu"  # eviction policy


@dataclass(frozen=True, slots=True)
class NeuronSpec:
    """`file`: an add-on file's path, AUTO for the one beside the pack where that pays, or OFF."""

    file: str = OFF
    eviction: str = DEFAULT


def parse_neurons(text: str) -> NeuronSpec:
    """Raises OptionError, UnsupportedError."""
    file, comma, rest = text.partition(",eviction=")
    if not file:
        raise OptionError(
            f"neurons {text!r}: off, auto or a file is expected, as FILE[,eviction=POLICY]"
        )
    if not comma:
        return NeuronSpec(file)
    if file == OFF:
        raise OptionError(f"neurons {text!r}: with off nothing is paged; leave the policy out")
    if rest in (*REPLAYED, PROFILED):
        raise OptionError(
            f"neurons {text!r}: {rest} needs to know the future, or a profile; use it in a replay"
        )
    registry.module(eviction, rest, "policy")
    return NeuronSpec(file, rest)
