"""Which of a model's weights are in memory while it runs: scratch is lent to slots between long spans, and
resident weights are dropped when memory gets short."""

from __future__ import annotations

from collections.abc import Sequence

from outsize.model.paged import PagedLayer
from outsize.model_config import Description
from outsize.pack.kinds.kind import kinds
from outsize.system import memory
from outsize.weights.load import Loaded
from outsize.weights.residency import RecordCache
from outsize.weights.routed import RoutedCache

SLACK = 4 << 20  # bytes over what cannot be returned, before returning is tried again


class WeightMemory:
    """The resident weights of an opened model, in the order in which they are least missed: an embedding of
    its own, slots of routed records (experts), layers from the last one on, the head."""

    def __init__(
        self,
        d: Description,
        loaded: Loaded,
        layers: Sequence[PagedLayer],
        ceiling: int | None = None,
    ) -> None:
        """`ceiling`: bytes that the process should not exceed, if returning free memory helps."""
        self._description, self._loaded, self._layers, self._ceiling = d, loaded, layers, ceiling
        self._num_resident = self._count_resident()
        self._lends, self._is_lent = any(cache.lends for cache in loaded.caches), False

    def _count_resident(self) -> int:
        return sum(layer.is_resident for layer in self._layers)

    def begin_step(self, is_large: bool) -> None:
        """A long span, or a batch, needs the scratch, which is else lent to slots."""
        if is_large:
            self._return_scratch()
            self._is_lent = False
        elif self._lends and not self._is_lent:
            memory.trim()
            for cache in self._loaded.caches:
                cache.borrow_scratch()
            self._is_lent = True

    def end_pass(self) -> None:
        """Resident sub-layers are hits that nobody else sees; experts' policies count passes."""
        self._loaded.stats.hits += self._num_resident
        caches: list[RecordCache] = [bank.cache for bank in self._loaded.banks]
        caches += [] if self._loaded.tokens is None else [self._loaded.tokens.cache]
        for cache in {*caches, *(bank.cache for bank in self._loaded.neurons)}:
            cache.slot_table.begin_pass()

    def trim(self) -> None:
        """Return free memory that the allocator keeps, if there is more of it than was planned: in some
        runs a long span's large blocks never fit the holes of earlier ones, and leave new holes."""
        if self._ceiling is not None and memory.resident() > self._ceiling:
            memory.trim()
            self._ceiling = max(self._ceiling, memory.resident() + SLACK)

    def shrink(self, size: int) -> int:
        """Return lent scratch, and then drop resident weights, until `size` bytes are free; the bytes of
        weights."""
        lent, self._lends = self._return_scratch(), False
        size, freed = size - lent, 0
        for drop in (self._drop_embed, self._drop_slots, self._drop_layers, self._drop_head):
            if freed < size:
                freed += drop(size - freed)
        self._num_resident = self._count_resident()
        if freed:
            memory.trim()
        return freed

    @property
    def droppable(self) -> int:
        """Bytes that shrinking could free."""
        found = [layer.source for layer in self._layers if layer.is_resident]
        resident = [source for source in found if source is not None]
        out = sum(s.cache.table.header.stride for s in resident)
        whole = {s.cache for s in resident if not s.cache.streams}  # keep a slot to stream through
        out -= sum(cache.table.header.stride for cache in whole)
        for cache, least in self._routed().items():
            out += max(0, cache.slots - least) * cache.table.header.stride
        embed, head = self._loaded.embed, self._loaded.head
        if embed is not head:
            out += embed.resident_bytes
        return out + max(0, head.resident_bytes - head.ring_bytes)

    def restore(self) -> None:
        """After a step that an exception broke off, wherever that was."""
        self._loaded.restore()
        self._is_lent, self._num_resident = False, self._count_resident()

    def _return_scratch(self) -> int:
        return sum(cache.return_scratch() for cache in self._loaded.caches)

    def _drop_embed(self, size: int) -> int:
        embed = self._loaded.embed
        return 0 if embed is self._loaded.head else embed.drop(False)

    def _drop_slots(self, size: int) -> int:
        freed = 0
        for cache, least in self._routed().items():
            freed += cache.shrink(size - freed, least)
        return freed

    def _drop_layers(self, size: int) -> int:
        freed = 0
        for layer in reversed(self._layers):
            if freed >= size:
                break
            freed += layer.unpin() if layer.is_resident else 0
        return freed

    def _drop_head(self, size: int) -> int:
        return self._loaded.head.drop(True)

    def _routed(self) -> dict[RoutedCache, int]:
        """The caches of routed records, each with the fewest slots that it can do with."""
        found = [c for c in self._loaded.caches if isinstance(c, RoutedCache)]
        headers = {cache: cache.table.header for cache in found}
        return {c: kinds()[h.kind].least_slots(self._description, h) for c, h in headers.items()}
