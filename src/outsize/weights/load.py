"""Load a pack's weights: every table by the loader of its kind, some records into memory, the others to be
fetched at each use.

A table kind's loader is the file of its name in this folder: `load(pack)` there opens the tables of that kind
and returns what the model reads them through.

    rows.py      embedding and head -> a `RowTable` each
    layers.py    attention and feed-forward -> a `LayerRecord` for each layer
    experts.py   experts -> an `ExpertBank` for each layer
    neurons.py   bundles of neurons, beside the pack -> a `NeuronBank` for each layer
    tokens.py    rows by token, of all layers together -> a `TokenTable`
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from outsize import registry
from outsize import weights as package
from outsize.kernels.backend import Backend
from outsize.kernels.plain import PLAIN
from outsize.pack.format import Pack
from outsize.pack.kinds.layers import DENSE, MIXERS, SHARING, WIDE
from outsize.progress import Progress, silent
from outsize.storage.table import activation_type
from outsize.weights.experts import ExpertBank
from outsize.weights.layers import LayerRecord
from outsize.weights.neurons import NeuronBank
from outsize.weights.open_pack import LoadPlan, OpenPack
from outsize.weights.residency import RecordCache
from outsize.weights.rows import RowTable
from outsize.weights.tokens import TokenTable


class Loaded:
    """Everything a transformer is built from; close it. `kinds`: what each table kind's loader returned."""

    def __init__(
        self, pack: OpenPack, kinds: Mapping[str, Any], lent: Loaded | None = None
    ) -> None:
        """`lent`: a model whose embedding and head this one reads, which has none."""
        rows: Mapping[str, RowTable] = kinds.get("rows", {})
        layers: Mapping[str, Mapping[int, LayerRecord]] = kinds["layers"]
        self.kinds = kinds
        self.embed: RowTable
        self.head: RowTable
        if lent is not None:
            self.embed, self.head = lent.embed, lent.head
            self._rows: tuple[RowTable, ...] = ()
        else:
            self.embed, self.head = rows["embed"], rows.get("head", rows["embed"])
            self._rows = tuple(dict.fromkeys((self.embed, self.head)))
        ffn = _joined(layers, ("ffn", WIDE + "ffn", DENSE))
        attn = _joined(layers, (*MIXERS, WIDE + "attn", SHARING, WIDE + SHARING))
        self.layers = tuple((attn[i], ffn.get(i)) for i in range(pack.pack.description.num_layers))
        self.tokens: TokenTable | None = kinds.get("tokens")
        self.banks: tuple[ExpertBank, ...] = kinds.get("experts", ())
        self.neurons: tuple[NeuronBank, ...] = kinds.get("neurons", ())
        final = layers["final"][0].pinned
        assert final is not None
        self.final_norm = final
        self.activation_type = activation_type(pack.pack.table_of("attn-0").tensors["o"])
        self.reader, self.tables = pack.reader, pack.tables
        self.stats, self.expert_stats = pack.stats, pack.expert_stats
        self._pack = pack
        self.ends: list[Callable[[], None]] = []  # called before it is closed

    @property
    def caches(self) -> list[RecordCache]:
        """All caches of records, those of rows, which may come later, too."""
        found = (rows.cache for rows in self._rows)
        return [*self._pack.caches, *(cache for cache in found if cache is not None)]

    def restore(self) -> None:
        """After a call that an exception broke off, wherever that was: what is resident stays, and of the
        rest only what is surely there is known."""
        self.reader.restart()
        for cache in self.caches:
            cache.restore()

    def close(self) -> None:
        """End the reading threads and close the files."""
        while self.ends:
            self.ends.pop()()
        self._pack.close()

    def close_with(self, owner: object) -> Callable[[], None]:
        """Close when nothing refers to `owner` any more, or when what this returns is called. Not at
        the exit, where other threads may still compute, nor in a fork, which has no threads to end."""
        end = weakref.finalize(owner, _close_in, os.getpid(), self.close)
        end.atexit = False
        return end


def _joined(
    layers: Mapping[str, Mapping[int, LayerRecord]], names: Sequence[str]
) -> dict[int, LayerRecord]:
    """By layer, out of the tables of several groups."""
    return {i: record for name in names for i, record in layers.get(name, {}).items()}


def _close_in(process: int, close: Callable[[], None]) -> None:
    if os.getpid() == process:
        close()


def load(
    pack: Pack,
    backend: Backend = PLAIN,
    plan: LoadPlan | None = None,
    progress: Progress = silent,
    lent: Loaded | None = None,
) -> Loaded:
    """Open a pack's tables and read what stays in memory: by default, everything. `lent`: see Loaded. Raises
    ReadError, and PackError if a record is damaged."""
    opened = OpenPack(pack, backend, plan or LoadPlan(), progress)
    try:
        kinds = dict.fromkeys(table.kind for table in pack.tables)
        if opened.plan.neurons is not None:
            kinds["neurons"] = None
        loaders = (registry.module(package, kind, "table kind") for kind in kinds)
        loaded = Loaded(
            opened, {k: loader.load(opened) for k, loader in zip(kinds, loaders, strict=True)}, lent
        )
        for cache in loaded.caches:
            cache.start()
        return loaded
    except BaseException:
        opened.close()
        raise
