"""The add-on file that says which sums between ranks are left out or short, with the corrections of those
left out, in safetensors, and what that was measured to cost. `outsize adapt sync` writes it. Hostile until
proven; refused for another pack, number of ranks or cut of heads than it was made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from outsize.checkpoint.lora import Stored
from outsize.errors import AdapterError
from outsize.kernels.turned import BITS
from outsize.pack.add_on import AddOn, shape_fault

KIND, VERSION = "sync points", 1
PLACES = "attention", "ffn", "block"
MOST_RANK = 4096
ADD_ON = AddOn(
    KIND, VERSION, "sums between ranks", "outsize adapt sync",
    "outsize adapt sync MODEL --ranks 2 --data FILE",
)  # fmt: skip


def suffix(world: int) -> str:
    """Of the file beside a pack that `drop=auto` finds."""
    return f".sync{world}.safetensors"


@dataclass(frozen=True, slots=True)
class SyncAbout:
    """What a file says of itself."""

    kind: str
    version: int
    identity: str  # of the pack: all that decides an answer
    layout: str  # of the pack's records
    key_ends: tuple[int, ...]  # where each rank's key heads end
    dropped: tuple[int, ...]  # layers whose attention is not summed
    bits: Mapping[
        str, int
    ]  # of a number of a message, by layer and place: 3.ffn; 16 where it says nothing
    corrected: tuple[int, ...]  # of the dropped layers, those with a correction
    rank: int  # of the corrections
    link: str  # that it was made for, and seconds of it a token: before, and now
    wire_before: float = 0.0
    wire: float = 0.0
    tokens: int = 0  # that the cost was measured on, held out
    perplexity_before: float = 0.0
    perplexity: float = 0.0
    change_low: float = 0.0  # of the perplexity, in percent: 95 % lie between
    change_high: float = 0.0
    text: str = ""
    key_orders: tuple[tuple[int, ...], ...] = ()  # of key heads, by layer; empty: the model's

    @property
    def world(self) -> int:
        return len(self.key_ends)

    @property
    def cost(self) -> str:
        """What it costs, in words."""
        change = 100 * (self.perplexity / self.perplexity_before - 1)
        return (
            f"perplexity {self.perplexity_before:,.2f} -> {self.perplexity:,.2f}, {change:+.2f} % "
            f"({self.change_low:+.2f} to {self.change_high:+.2f}; {self.tokens:,} tokens of {self.text})"
        )

    def to_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class SyncFile:
    """An add-on file: what it says, and its tensors, read when they are asked for."""

    path: Path
    about: SyncAbout
    tensors: Stored

    def corrections(self, rank: int) -> dict[str, Tensor]:
        """A rank's, by layer and factor: 3.first (2D + 1, R), 3.second (R, D), bf16. Raises AdapterError if
        numbers in it are none."""
        found = {
            f"{layer}.{factor}": self.tensors[f"{layer}.{rank}.{factor}"]
            for layer in self.about.corrected
            for factor in ("first", "second")
        }
        for name, x in found.items():
            if x.dtype != torch.bfloat16 or not bool(torch.isfinite(x).all()):
                raise ADD_ON.damaged(
                    self.path, f"{name} has numbers that are not finite, or no bf16"
                )
        return found


def read(path: Path, num_layers: int, width: int) -> SyncFile:
    """Raises AdapterError for what is no such file, or is damaged."""
    tensors, about = ADD_ON.read(path, SyncAbout)
    if problem := _fault(about, tensors, num_layers, width):
        raise ADD_ON.damaged(path, problem)
    return SyncFile(path, about, tensors)


def check(file: SyncFile, identity: str, layout: str, name: str, world: int) -> None:
    """Raise AdapterError for another pack, or number of ranks, than the file was made for."""
    if (file.about.identity, file.about.layout) != (identity, layout):
        raise AdapterError(
            f"{file.path} is for another pack than {name}; make one with `outsize adapt sync`"
        )
    if file.about.world != world:
        raise AdapterError(
            f"{file.path} is for {file.about.world} ranks, and there are {world}; make one with `outsize "
            f"adapt sync --ranks {world}`"
        )


def _fault(about: SyncAbout, tensors: Stored, num_layers: int, width: int) -> str:
    """What is wrong with a file, in a clause; "" if nothing is."""
    layers = set(range(num_layers))
    if not set(about.dropped) <= layers or not set(about.corrected) <= set(about.dropped):
        return "it names layers that there are not"
    if not about.key_ends or sorted(set(about.key_ends)) != list(about.key_ends):
        return f"its ranks' key heads end at {about.key_ends}"
    known = {f"{layer}.{place}" for layer in layers for place in PLACES}
    if not set(about.bits) <= known or not set(about.bits.values()) <= set(BITS):
        return "it gives bits to what is no sum, or other than 4, 5, 6 or 8"
    if not 0 < about.rank <= MOST_RANK:
        return f"its corrections are of rank {about.rank}"
    if not 0 < about.perplexity_before < 1e9 or not 0 < about.perplexity < 1e9:
        return "its perplexities are none"
    shapes = {"first": (2 * width + 1, about.rank), "second": (about.rank, width)}
    due = {
        f"{layer}.{rank}.{factor}": shape
        for layer in about.corrected
        for rank in range(about.world)
        for factor, shape in shapes.items()
    }
    return shape_fault(due, tensors)
