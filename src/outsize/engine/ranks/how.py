"""What ranks can be asked for, and what the model of each is run with."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from outsize.draft.spec import parse_draft
from outsize.engine.ranks.sync import correction_bytes
from outsize.errors import OptionError
from outsize.forward.relay import Relay
from outsize.forward.runahead import WINDOW
from outsize.kernels.attention import CHUNK
from outsize.kernels.backend import Backend
from outsize.model.width import parse_width
from outsize.model_config import Description
from outsize.options import LoadOptions
from outsize.parallel.collective import Collective
from outsize.parallel.dropped import Drop
from outsize.parallel.exact import Exact
from outsize.parallel.points import Points, parse_dropped
from outsize.parallel.spec import ParallelSpec, parse_parallel
from outsize.parallel.transport import Transport
from outsize.plan import probe
from outsize.system import memory
from outsize.weights.neuron_spec import OFF
from outsize.weights.spec import parse_experts


def settled(options: LoadOptions) -> LoadOptions:
    """The options of a leader: ranks on one machine share its memory and processors; what the others cannot
    be told of is left out where it is a default. Raises OptionError."""
    if options.ranks == 1:
        _refuse_alone(options)
        return options
    spec = parse_parallel(options.parallel)
    _refuse(options, spec)
    if parse_draft(options.draft).kind == "auto":
        options = replace(options, draft="ngram")
    if not keeps_all(spec):
        options = replace(options, prefix_cache="off")
    if options.listen is None:
        if options.memory == "auto":
            options = replace(options, memory=memory.parse("auto") // options.ranks)
        if options.threads is None:
            options = replace(options, threads=max(1, probe.allowed() // options.ranks))
    return options


def _refuse_alone(options: LoadOptions) -> None:
    if options.listen is not None and "listen" not in options.defaults:
        raise OptionError(
            f"listen is {options.listen!r}, and one rank waits for nobody; give --ranks 2 or more, or leave "
            "it out"
        )
    parse_parallel(options.parallel)


def _refuse(options: LoadOptions, spec: ParallelSpec) -> None:
    """What ranks do not share. Raises OptionError."""
    lossy, kind = parse_experts(options.experts or "").lossy, parse_draft(options.draft).kind
    if spec.way.cut == "experts" and lossy:
        raise OptionError(
            f"experts has {lossy}, by which ranks with different caches would choose different experts; "
            "leave it out, or use --parallel relay"
        )
    given = {
        "experts": options.experts is not None and spec.way.cut in ("gather", "sum"),
        "neurons": options.neurons != OFF,
        "prefill": options.prefill != "full",
        "width": parse_width(options.width) != 1.0,
        "draft": kind == "nested" or (kind == "mtp" and spec.way.cut != "whole"),
    }
    for name, is_given in given.items():
        if is_given:
            value = getattr(options, name)
            raise OptionError(
                f"{name} is {value}, which several ranks do not run; leave it out, or --ranks"
            )
    kept, is_apart = options.prefix_cache, not keeps_all(spec)
    if is_apart and kept not in (None, "off") and "prefix_cache" not in options.defaults:
        raise OptionError(
            f"prefix_cache is {kept!r}, and with parallel {spec} no rank has all keys of a prompt; use "
            "tensor with attention=whole, or --prefix-cache off"
        )


class Joined(NamedTuple):
    """What a rank's model is run with: sums and gathers, or a place in a row of stages."""

    ranks: Collective | None
    relay: Relay | None


def joined(
    spec: ParallelSpec, transport: Transport, backend: Backend, points: Points | None = None
) -> Joined:
    """As the spec says. `points`: what becomes of each sum, where that is not the spec's alone."""
    if spec.way.cut == "layers":
        return Joined(None, Relay(transport))
    if spec.way.cut == "whole":
        return Joined(None, None)
    points = points or Points(Drop(frozenset(parse_dropped(spec.drop))), {}, spec.bits)
    return Joined(points.collective(Exact(transport), backend), None)


def extra_bytes(spec: ParallelSpec, points: Points, d: Description, world: int) -> int:
    """Of messages under way, and corrections, beside what a model alone needs."""
    moving = {"whole": 2 * WINDOW, "experts": 4 * CHUNK * d.width * (world + 2)}
    return correction_bytes(points) + moving.get(spec.way.cut, 0)


def keeps_all(spec: ParallelSpec) -> bool:
    """Has each rank all keys and values?"""
    return spec.way.attention == "whole" and spec.way.cut != "layers"


def address(text: str) -> tuple[str, int]:
    """Of HOST:PORT. Raises OptionError."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise OptionError(f"{text!r} is no address; HOST:PORT is expected, as in 10.0.0.1:7700")
    return host.strip("[]"), int(port)
