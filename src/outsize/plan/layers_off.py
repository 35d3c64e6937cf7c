"""What `--layers-off` says: layers whose feed-forward of the token's embedding a run leaves out (lossy;
MemoryLLM's plug-and-play, arXiv 2602.00398). Text -> layers -> a model's description."""

from __future__ import annotations

import re
from dataclasses import replace

from outsize.errors import OptionError
from outsize.model_config import Description

ONE = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")


def parse_layers(text: str) -> tuple[int, ...]:
    """Numbers of layers, from 0 on: `3,7-9`; none of "". Raises OptionError."""
    found = set[int]()
    for word in text.split(",") if text else ():
        match = ONE.fullmatch(word.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise OptionError(
                f"layers_off is {text!r}; numbers of layers are expected, from 0 on, as in 3,7-9"
            )
        found |= set(range(first, last + 1))
    return tuple(sorted(found))


def with_layers_off(d: Description, text: str, name: str) -> Description:
    """The description of a run without some layers' memories. Raises OptionError for a model that has none,
    or not so many layers."""
    off = parse_layers(text)
    if not off:
        return d
    if d.memory is None:
        raise OptionError(
            f"layers_off is {text!r}, and the feed-forwards of {name} read more than the token's embedding: "
            "none can be left out; leave the option out"
        )
    if off[-1] >= d.num_layers:
        raise OptionError(
            f"layers_off is {text!r}, and {name} has layers 0 to {d.num_layers - 1}; name some of those"
        )
    return replace(d, memory=replace(d.memory, off=off))


def note(d: Description) -> str:
    """What that costs, in a sentence; "" where nothing is left out."""
    if d.memory is None or not d.memory.off:
        return ""
    off = d.memory.off
    layers = f"layer{'s' * (len(off) > 1)} {', '.join(map(str, off))}"
    return f"the memory of {layers} is left out, which changes answers (lossy)"
