"""A pack's tables -> the weights of a transformer, all resident."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from outsize.native.kernels import Kernels
from outsize.pack.format import Pack
from outsize.weights.residency import resident, resident_rows
from outsize.weights.table import Table, Traffic, Weight, Weights

Tick = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Loaded:
    """Everything a transformer is built from."""

    embed: Weight
    head: Weight
    layers: tuple[tuple[Weights, Weights], ...]  # attention, feed-forward
    final_norm: Weights


def load_resident(pack: Pack, kernels: Kernels | None, traffic: Traffic, progress: Tick) -> Loaded:
    """Read a whole pack into memory. Raises PackError if a record is damaged."""
    done = 0

    def tick(size: int) -> None:
        nonlocal done
        done += size
        progress("loading", done, pack.size)

    rows: dict[str, Weight] = {}
    layers: dict[str, dict[int, Weights]] = {"attn": {}, "ffn": {}, "final": {}}
    for header in pack.tables:
        table = Table(pack.path, header, traffic)
        try:
            if header.kind == "rows":
                rows[header.name] = resident_rows(table, kernels, tick)
            else:
                layers[header.name.split("-")[0]] |= resident(table, kernels, tick)
        finally:
            table.close()
    pairs = ((layers["attn"][i], layers["ffn"][i]) for i in range(pack.description.num_layers))
    head = rows.get("head", rows["embed"])
    return Loaded(rows["embed"], head, tuple(pairs), layers["final"][0])
