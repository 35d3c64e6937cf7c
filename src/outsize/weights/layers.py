"""The table kind "layers": a record is one layer's attention or its feed-forward (with experts: its router).
Some are pinned in memory, the others fetched at each use."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from outsize.storage.table import Weights
from outsize.weights.open_pack import OpenPack
from outsize.weights.scan import ScanCache


@dataclass(slots=True)
class LayerRecord:
    """One layer's record: `with record as weights` fetches it. `pinned`: its weights, as long as they are
    resident; None: it must be fetched."""

    cache: ScanCache
    index: int
    pinned: Weights | None

    def __enter__(self) -> Weights:
        return self.cache.fetch([self.index])[0]

    def __exit__(self, *error: object) -> None:
        self.cache.release()

    def unpin(self) -> int:
        """Fetch it from now on; the bytes this frees."""
        self.pinned = None
        return self.cache.unpin(self.index)


def resident(record: LayerRecord | None) -> Weights:
    """A record's weights, if they are in memory; none of a sub-layer that has no record."""
    return {} if record is None or record.pinned is None else record.pinned


def load(pack: OpenPack) -> dict[str, dict[int, LayerRecord]]:
    """By sub-layer ("attn", "ffn", "final") and layer. Layers of unequal encodings are in several tables."""
    out: dict[str, dict[int, LayerRecord]] = defaultdict(dict)
    for table, share in pack.open("layers", pack.stats):
        cache = ScanCache(table, pack.reader, share)
        pack.caches.append(cache)
        pinned = cache.load(share.pinned, pack.on_read)
        sublayer = out[table.header.name.split("-")[0]]
        for i, layer in enumerate(table.header.keys):
            sublayer[layer] = LayerRecord(cache, i, pinned.get(i))
    return out
