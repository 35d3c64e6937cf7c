"""What the requests on an opened model share: weights, adapters, the memory that the plan gave; any number of
threads take turns step by step. `engine/batch.py` runs requests."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import TypeVar
from weakref import WeakSet

import torch

from outsize.draft.drafter import Company
from outsize.draft.load import Drafting
from outsize.draft.nested import Own
from outsize.draft.spec import DraftSpec
from outsize.engine.choosing import chooser
from outsize.engine.decode import decode
from outsize.engine.drive import Flow
from outsize.engine.prefixes import Prefixes
from outsize.engine.reply import Reply, Usage, account
from outsize.engine.request import Counts, Request
from outsize.engine.step_lock import StepLock
from outsize.errors import OptionError, PeerError
from outsize.forward.forward import Forward
from outsize.forward.lazy import lazy
from outsize.kv.kv import KV
from outsize.kv.prefix import CachedPrefix
from outsize.log import warn
from outsize.model.lora import Adapter
from outsize.model.transformer import Transformer
from outsize.plan.placement import Placement
from outsize.storage.stats import IOStats
from outsize.system import memory

T = TypeVar("T")
NO_DRAFTS = Drafting(DraftSpec("none"))


class Scheduler:
    """Runs requests on one opened model, for any number of threads. After an exception in the middle of a
    step, the next step finds everything as it must be."""

    def __init__(
        self,
        name: str,
        transformer: Transformer,
        placement: Placement,
        drafting: Drafting,
        forward: Forward = lazy,
        prefixes: Prefixes | None = None,
    ) -> None:
        """`prefixes`: keeps what was computed, for prompts that begin alike."""
        self.name, self.placement, self.drafting = name, placement, drafting
        self.forward, self.prefixes = forward, prefixes
        self.company = Company()
        self.adapters: dict[str, Adapter] = {}
        self.again: Callable[[PeerError], None] | None = None  # has lost ranks come again
        self.conversations: WeakSet[CachedPrefix] = WeakSet()
        self.given_up = 0  # bytes of weights that were resident at first, and had to go
        self._transformer: Transformer | None = transformer
        self._watch = memory.Watch(placement.budget)
        self._lock = StepLock(name, partial(_restore, transformer, drafting))
        self._end = transformer.loaded.close_with(self)
        memory.promise(self, placement.later)

    @property
    def transformer(self) -> Transformer:
        """The network. Raises ClosedError, ForkError."""
        self.check()
        assert self._transformer is not None
        return self._transformer

    def check(self) -> None:
        """Raises ClosedError, ForkError."""
        self._lock.check()

    def take(self, step: Callable[[], T]) -> T:
        """Do something alone with the weights, between two steps; once more, where a rank was lost and has
        come again. Raises BusyError, ClosedError, PeerError."""
        try:
            return self._lock.take(step)
        except PeerError as e:
            if self.again is None:
                raise
            self.again(e)
        return self._lock.take(step)

    def close(self) -> None:
        """Release weights, threads, files and memory, once a step that another thread is in has ended."""
        if self._transformer is not None:
            self._lock.close(self._end)
            self.drafting.close()
            self.adapters.clear()
            if self.prefixes is not None:
                self.prefixes.close()
        self._transformer = None
        memory.promise(self, 0)
        memory.trim()

    def adapter(self, name: str | None) -> Adapter | None:
        """Raises OptionError for a name that is not loaded."""
        if name is not None and name not in self.adapters:
            known = ", ".join(self.adapters) or "none is loaded"
            raise OptionError(
                f"adapter {name!r} is not known: {known}; --adapter NAME=PATH loads one"
            )
        return None if name is None else self.adapters[name]

    def flow(self, request: Request) -> Flow:
        """What a request asks of each step. Raises OptionError for an adapter that is not loaded."""
        constraint, adapter = request.seq.constraint, self.adapter(request.adapter)
        prune = request.seq.prune
        revives = prune is not None and prune.mode == "revive"
        drafting = NO_DRAFTS if revives else self.drafting
        # Of a sequence some of whose tokens skip layers, nothing but its own steps knows the cache.
        own = None if prune is not None else Own(lambda: request.kv, adapter)
        sampler, drafts = chooser(request.options, drafting, constraint, self.company, own)
        request.sampler = sampler
        return decode(request.seq, drafts, sampler, request.drafts, request.cached, adapter)

    def keep_budget(self) -> None:
        """Let go of kept prompts, then of resident weights, if others need the memory, or we have more than
        was planned."""
        excess = self._watch.excess()
        if excess and self.prefixes is not None:
            excess = max(0, excess - self.prefixes.shrink(excess))
        if excess:
            self.give_up(excess, f"memory is short by {excess / 1e6:,.0f} MB")

    def give_up(self, size: int, why: str) -> None:
        """Drop `size` bytes of resident weights, between two steps: they are read from disk from now on."""
        if freed := self.transformer.memory.shrink(size):
            self.given_up += freed
            warn(
                f"{why}: {freed / 1e6:,.0f} MB of weights are read from disk from now on, which is slower"
            )

    def settle(self) -> None:
        """Wait until prompts that are kept on disk are written."""
        if self.prefixes is not None:
            self.prefixes.flush()

    def apart(self, running: Collection[KV]) -> int:
        """Tokens whose keys and values conversations keep between their turns."""
        kvs = [prefix.kv for prefix in self.conversations]
        return sum(kv.length for kv in kvs if not any(kv is one for one in running))

    def counts(self) -> Counts:
        """What has been read and waited for so far. Raises ClosedError."""
        loaded = self.transformer.loaded
        stats = loaded.stats + loaded.expert_stats, loaded.expert_stats + IOStats()
        return Counts(*stats, *self.transformer.steps)

    @property
    def bytes_read(self) -> int:
        """Of weights, since the model was opened. Raises ClosedError."""
        loaded = self.transformer.loaded
        return loaded.stats.bytes_read + loaded.expert_stats.bytes_read

    def reply(self, request: Request, started: float, before: Counts) -> Reply:
        """The reply of a run that has ended, or was interrupted, with its usage statistics."""
        size, threads = self.placement.budget, torch.get_num_threads()
        context = self.placement.context
        shown = {**request.options.to_json(), "context": context, "threads": threads}
        shown |= {"memory": size, "chunk": self.transformer.chunk, "kv": self.transformer.kv}
        shown["neurons"] = self.transformer.neurons or "off"
        width = request.seq.width
        shown["width_cost"] = "" if width is None else self.transformer.nested.cost(width.share)
        if self.transformer.loaded.tokens is not None:
            shown["table"] = "rows by token"
        if off := self.transformer.description.layers_off:
            shown["layers_off"] = ", ".join(map(str, off))
        tables = self.transformer.loaded.tables
        cached = not all(table.is_direct for table in tables)
        return account(request, self.name, shown, Usage(started, before, self.counts(), cached))


def _restore(transformer: Transformer, drafting: Drafting) -> None:
    """After a step that an exception broke off."""
    transformer.memory.restore()
    drafting.restore()
