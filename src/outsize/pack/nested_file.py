"""The add-on file of nested experts: routers, corrections, and what each of their thresholds executes and
costs, in safetensors, beside the pack. `outsize adapt nested` writes it. Hostile until proven; refused for
another pack, or another order of its neurons, than it was made for.

Shapes: L layers, M widths, D width of the stream, N pieces of a layer, K rows of the family, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from outsize.checkpoint.lora import Stored, raw
from outsize.errors import AdapterError
from outsize.pack.add_on import AddOn, printable, shape_fault
from outsize.pack.format import Pack

KIND, VERSION = "nested", 1
SUFFIX = ".nested.safetensors"
ROUTER, BIAS, USE = "router", "bias", "use"
A, B, C = "a", "b", "c"  # of corrections
MOST_ROWS, MOST_RANK = 64, 1024
ADD_ON = AddOn(
    KIND,
    VERSION,
    "nested experts",
    "outsize adapt nested",
    "outsize adapt nested MODEL --data FILE",
)


@dataclass(frozen=True, slots=True)
class Member:
    """One of the family: a threshold, the share of the feed-forwards that it executes on average, and what
    that costs on a held-out text."""

    threshold: float
    share: float
    perplexity: float
    kl: float  # mean divergence from the whole model, in nats
    agrees: float  # share of predictions whose likeliest token is the whole model's


@dataclass(frozen=True, slots=True)
class NestedAbout:
    """What a file says of itself."""

    kind: str
    version: int
    identity: str  # of the pack: all that decides an answer
    layout: str  # of the pack's records: its numbers, and their order
    count: int  # pieces of a layer
    widths: tuple[int, ...]  # pieces of each width, rising; the last are all
    rank: int  # of corrections; 0: there are none
    labels: str  # what difficulty was judged by
    level: float  # error, below which a width is good enough
    family: tuple[Member, ...]  # by threshold, rising; without the whole model
    perplexity: float  # of the whole model
    tokens: int  # that were predicted
    text: str  # which
    trained_tokens: int
    minutes: float
    seed: int

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def cost(self, share: float) -> str:
        """What a share costs, in words: the nearest member's."""
        if share >= 1:
            return "exact"
        near = min(self.family, key=lambda m: abs(m.share - share))
        return (
            f"lossy: perplexity {self.perplexity:,.2f} -> {near.perplexity:,.2f} at {near.share:.2f} "
            f"({self.tokens:,} tokens of {printable(self.text)})"
        )


@dataclass(frozen=True, slots=True)
class NestedFile:
    """An add-on file: what it says, and its tensors, read when they are asked for."""

    path: Path
    about: NestedAbout
    tensors: Stored

    def numbers(self, name: str) -> Tensor:
        """A tensor in fp32. Raises AdapterError if numbers in it are none."""
        found = self.tensors[name].float()
        if not bool(torch.isfinite(found).all()):
            raise ADD_ON.damaged(self.path, f"{name} has numbers that are not finite")
        return found

    def uses(self) -> Tensor:
        """(K, L, N) how often a token uses each piece. Raises AdapterError."""
        found = self.numbers(USE)
        if bool(((found < 0) | (found > 1)).any()):
            raise ADD_ON.damaged(self.path, "its shares of uses are not from 0 to 1")
        return found

    @property
    def size(self) -> int:
        """Bytes in memory."""
        shapes = {n: s for n, s in self.tensors.shapes().items() if n != USE}
        return 4 * sum(torch.Size(s).numel() for s in shapes.values())


def beside(pack: Pack) -> Path:
    """Where a pack's add-on is."""
    return pack.path.with_name(pack.path.name + SUFFIX)


def of_pack(pack: Pack) -> NestedFile | None:
    """The add-on beside a pack, if there is one. Raises AdapterError for one that is damaged, or another
    pack's."""
    path = beside(pack)
    return read(path, pack) if path.is_file() else None


def read(path: Path, pack: Pack) -> NestedFile:
    """Raises AdapterError for what is no such file, damaged, or for another pack."""
    tensors, said = raw(path)
    if said.get("kind") != KIND or said.get("version") != VERSION:
        raise AdapterError(
            f"{path} is no file of {ADD_ON.what} of this version ({VERSION}); `{ADD_ON.example}` makes one"
        )
    about = ADD_ON.parsed(path, said, NestedAbout)
    if (about.identity, about.layout) != (pack.source.identity, pack.source.layout):
        raise AdapterError(
            f"{path} is for another pack than {pack.path.name}, or for another order of its neurons, whose "
            "numbers its routers know; make one with `outsize adapt nested`"
        )
    if problem := _fault(about, tensors, pack):
        raise ADD_ON.damaged(path, problem)
    return NestedFile(path, about, tensors)


def _fault(about: NestedAbout, tensors: Stored, pack: Pack) -> str:
    """What is wrong with a file, in a clause; "" if nothing is."""
    d, widths = pack.description, about.widths
    mixture = d.mixture
    if mixture is None or about.count != mixture.count:
        return f"it has {about.count:,} pieces a layer, which are not the pack's"
    rises = all(a < b for a, b in pairwise((0, *widths)))
    if not rises or not widths or widths[-1] != about.count:
        return f"its widths {widths[:8]} do not rise to {about.count:,} pieces"
    if not 0 <= about.rank <= MOST_RANK:
        return f"its rank is {about.rank:,}"
    if problem := _family_fault(about.family):
        return problem
    if about.perplexity < 1:
        return f"its perplexity is {about.perplexity:g}"
    layers, m, rank = d.num_layers, len(widths), about.rank
    due: dict[str, tuple[int, ...]] = {
        ROUTER: (layers, m, d.width),
        BIAS: (layers, m),
        USE: (len(about.family), layers, about.count),
    }
    if rank:
        due |= {A: (layers, m - 1, rank, d.width), B: (layers, m - 1, d.width, rank)}
        due |= {C: (layers, m - 1, d.width)}
    return shape_fault(due, tensors)


def _family_fault(family: Sequence[Member]) -> str:
    if not 0 < len(family) <= MOST_ROWS:
        return f"its family has {len(family):,} members"
    rises = all(a.threshold < b.threshold and a.share <= b.share for a, b in pairwise(family))
    if not rises or family[0].threshold < 0 or not 0 < family[0].share <= family[-1].share <= 1:
        return "the shares of its family do not rise with their thresholds"
    sound = all(m.perplexity >= 1 and m.kl >= 0 and 0 <= m.agrees <= 1 for m in family)
    return "" if sound else "what its family costs is out of range"
