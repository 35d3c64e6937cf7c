"""Which sums between ranks a run leaves out or sends short: what the spec says, or a file of `outsize adapt
sync`, which the leader reads, and of which each rank is told its part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as loads
from safetensors.torch import save as saves
from torch import Tensor

from outsize.engine.ranks.talk import Talk, field
from outsize.errors import AdapterError, PeerError
from outsize.home import expanded
from outsize.model_config import Description
from outsize.pack import sync_file
from outsize.pack.format import Pack
from outsize.pack.sync_file import SyncFile
from outsize.parallel import dropped
from outsize.parallel.dropped import Correction, Drop
from outsize.parallel.points import AUTO, Points, parse_dropped
from outsize.parallel.spec import ParallelSpec
from outsize.parallel.split import Way

MOST = 1 << 32  # bytes of a rank's corrections


@dataclass(frozen=True)
class Sync:
    """Of all ranks. `way`: with the file's cut of heads."""

    way: Way
    layers: tuple[int, ...] = ()
    rest: int = 16
    file: SyncFile | None = None

    def lossy(self, spec: ParallelSpec) -> str:
        """What it costs, in a sentence; "" where sums are whole."""
        if self.file is not None:
            return f"parallel {spec} is lossy: {self.file.about.cost}"
        if spec.lossy:
            return f"{spec.lossy} is lossy: answers change a little; leave it out for equal ones"
        return ""

    def points(self, rank: int) -> Points:
        """A rank's. Raises AdapterError."""
        if self.file is None:
            return Points(Drop(frozenset(self.layers)), {}, self.rest)
        factors, about = self.file.corrections(rank), self.file.about
        return Points(_drop(self.layers, factors), dict(about.bits), self.rest)

    def told(self, rank: int) -> tuple[dict[str, object], bytes]:
        """What a rank is told; and its corrections, which follow, if there are any. Raises AdapterError."""
        bits: Mapping[str, int] = {} if self.file is None else self.file.about.bits
        found = {} if self.file is None else self.file.corrections(rank)
        data = saves(found) if found else b""
        said = {"dropped": list(self.layers), "bits": dict(bits), "rest": self.rest}
        return said | {"size": len(data)}, data


def find(spec: ParallelSpec, pack: Pack, world: int) -> Sync:
    """What the spec means for a pack. Raises OptionError, UnsupportedError, AdapterError."""
    d, layers = pack.description, parse_dropped(spec.drop)
    if spec.drop != AUTO:
        _check(layers, d)
        return Sync(spec.way, layers, spec.bits)
    beside = pack.path.with_name(pack.path.name + sync_file.suffix(world))
    path = expanded(spec.sync) if spec.sync else beside
    if not path.is_file():
        raise AdapterError(
            f"drop=auto takes what a file says of {world} ranks, and there is no {path}; make it with "
            f"`outsize adapt sync MODEL --ranks {world} --data FILE`, or name layers, as drop=8-11"
        )
    file = sync_file.read(path, d.num_layers, d.width)
    sync_file.check(file, pack.source.identity, pack.source.layout, pack.path.name, world)
    _check(file.about.dropped, d)
    way = replace(spec.way, key_ends=file.about.key_ends, key_orders=file.about.key_orders)
    return Sync(way, file.about.dropped, 16, file)


def _check(layers: tuple[int, ...], d: Description) -> None:
    for layer in layers:
        is_mixed = d.mixture is not None
        dropped.check(layer, mixture=is_mixed, post_norm=d.post_norm, num_layers=d.num_layers)


def hear(talk: Talk, told: Mapping[str, Any]) -> Points:
    """A follower's points. Raises PeerError."""
    said = field(told, "points", dict, 0)
    layers, bits = field(said, "dropped", list, 0), field(said, "bits", dict, 0)
    size, rest = field(said, "size", int, 0), field(said, "rest", int, 0)
    if not all(type(n) is int for n in (*layers, *bits.values())) or not 0 <= size <= MOST:
        raise PeerError("rank 0 sent of its sums what is no plan", 0)
    try:
        factors = loads(talk.take(0, size)) if size else {}
        return Points(_drop(layers, factors), bits, rest)
    except (SafetensorError, KeyError, ValueError) as e:
        raise PeerError(f"rank 0 sent corrections that are none ({e})", 0) from None


def _drop(layers: tuple[int, ...], factors: Mapping[str, Tensor]) -> Drop:
    of = sorted({int(name.partition(".")[0]) for name in factors})
    made = {
        i: Correction(factors[f"{i}.first"].float(), factors[f"{i}.second"].float()) for i in of
    }
    return Drop(frozenset(layers), made)


def held_bytes(points: Points, d: Description, number: int) -> int:
    """Of one token of a prompt: what a dropped layer keeps until its feed-forward has it. `number`: bytes of
    an activation."""
    return 2 * d.width * number if points.drop.layers else 0


def correction_bytes(points: Points) -> int:
    return sum(c.first.nbytes + c.second.nbytes for c in points.drop.corrections.values())
