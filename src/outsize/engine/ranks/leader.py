"""The leader of a model's ranks: tells each what is its, leads their steps, and has those that are lost come
again."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch

from outsize.engine.ranks.adapters import give, read, tell
from outsize.engine.ranks.children import Children
from outsize.engine.ranks.how import Joined, extra_bytes, joined, keeps_all
from outsize.engine.ranks.meet import How, met_again
from outsize.engine.ranks.sync import held_bytes
from outsize.engine.ranks.talk import Talk
from outsize.errors import PeerError
from outsize.forward.chain_costs import hear
from outsize.forward.forward import Forward
from outsize.forward.lazy import lazy
from outsize.forward.lead import Lead
from outsize.forward.runahead import Chain
from outsize.home import home
from outsize.model.lora import Adapter
from outsize.model.transformer import Transformer
from outsize.model_parts import Shard
from outsize.options import LoadOptions
from outsize.pack.format import Pack
from outsize.pack.outline import Outline
from outsize.parallel.collective import Collective
from outsize.parallel.cuts import Choice, read_table
from outsize.parallel.shard import cut
from outsize.parallel.transport import Switch, Transport
from outsize.progress import bars
from outsize.weights.load import Loaded

CUTS_FILE = "cuts.json"  # in the user's folder: what was searched for, by model and ranks


class Team:
    """The ranks of a model that is being opened, and then runs. Close it."""

    def __init__(
        self,
        pack: Pack,
        shards: tuple[Shard, ...],
        talk: Talk,
        how: How,
    ) -> None:
        """`pack`: the model's."""
        self.whole, self.shards, self._talk, self._how = pack, shards, talk, how
        self._spec, self._points = how.spec, how.sync.points(0)
        self.lead: Lead | Chain | None = None
        self._planned: dict[str, object] = {}
        self._model: Callable[[], Transformer | None] = lambda: None
        self._adapters: Sequence[Adapter] = ()
        self._children: Children | None = None
        self._lock, self._again = threading.Lock(), threading.Lock()

    def cut(self, home: Path, quiet: bool) -> Pack:
        """The leader's own shard, while the others cut theirs. Raises PackError, DiskFullError."""
        with bars(quiet) as progress:
            return cut(self.whole, self.shards[0], home, progress)

    def plan(
        self, context: int, chunk: int, options: LoadOptions, adapters: Sequence[Adapter]
    ) -> None:
        """What the others plan for, and their adapters' files. Raises PeerError where one of them has no
        room."""
        self._adapters = adapters
        names = "kv", "verify", "streams", "force"
        told = {name: getattr(options, name) for name in names}
        self._planned = {"context": context, "chunk": chunk, **told}
        self._say_plan()

    def tell_shards(self) -> None:
        """Each what is its. Raises PeerError."""
        for rank in self._talk.mesh.data:
            told = {"shard": asdict(self.shards[rank]), "threads": torch.get_num_threads()}
            points, factors = self._how.sync.told(rank)
            self._talk.say(rank, told | {"parallel": str(self._spec), "points": points})
            if factors:
                self._talk.give(rank, factors)

    def _say_plan(self) -> None:
        files = read(self._how.options.adapters)
        self._talk.say_all({**self._planned, "adapters": tell(files)})
        for rank in self._talk.mesh.data:
            give(self._talk, rank, files)
        self._talk.hear_all()

    def _go(self) -> Transport:
        self._talk.say_all({"go": True})
        return self._spec.slowed(self._talk.transport(self._spec.over))

    def connect(self) -> Joined:
        """What its model is run with. Raises PeerError."""
        self._transport = Switch(self._go())
        return joined(self._spec, self._transport, self._how.backend, self._points)

    def begin(self, model: Transformer) -> None:
        """Lead, from now on. Raises PeerError."""
        self._model = weakref.ref(model)
        if self._spec.way.cut != "whole":
            self.lead = model.leader = Lead(self._transport, keeps_all(self._spec))
            self.lead.adapters = self._adapters
            return
        chain = hear(model, self._transport)
        table = read_table(home() / CUTS_FILE, table_key(self.whole, self._talk.world))
        how = self._spec.shares or self._spec.cuts
        self.lead = Chain(self._transport, Choice(how, chain, table))
        self.lead.costs = chain
        self.lead.adapters = self._adapters

    def again(self, why: PeerError) -> None:
        """A rank was lost: wait for all to come again, and go on with what the leader has. Raises `why` where
        that cannot be (ranks that it started itself; keys that only the lost one had), PeerError where nobody
        comes."""
        model, listens = self._model(), self._how.options.listen is not None
        if not listens or not keeps_all(self._spec) or model is None or self.lead is None:
            raise why
        with self._again:
            if not self.lead.broken:
                return  # another caller was here before
            self._talk.mesh.close(why)
            self._talk = met_again(self._how, self.whole, str(why))
            self.tell_shards()
            self._say_plan()
            self._transport.replace(self._go())
            self.lead.renew()
            if isinstance(self.lead, Chain):
                hear(model, self._transport)

    @property
    def forward(self) -> Forward:
        """What runs its steps."""
        return self.lead if isinstance(self.lead, Chain) else lazy

    @property
    def extra_bytes(self) -> int:
        """That this rank needs beside what a model alone does."""
        d, world = self.whole.description, len(self.shards)
        return extra_bytes(self._spec, self._points, d, world)

    def held(self, outline: Outline) -> Outline:
        """With what a token of a prompt takes more than in a model alone."""
        size = held_bytes(self._points, outline.description, outline.activation_bytes)
        return replace(outline, held=size)

    def owns(self, children: Children | None) -> None:
        """Which processes end with it."""
        self._children = children

    @property
    def children(self) -> list[int]:
        """Ids of the processes that it started."""
        return [] if self._children is None else self._children.ids

    def close(self, why: BaseException | None = None) -> None:
        """End all ranks. They are told why."""
        with self._lock:
            if why is None and self.lead is not None:
                with suppress(PeerError):  # who is lost need not be told
                    self.lead.end()
            self._talk.mesh.close(why)
            if self._children is not None:
                self._children.close()


def beside(team: Team | None, outline: Outline) -> tuple[Outline, int]:
    """A model's outline as the planner sees it, and bytes that its ranks take besides."""
    return (outline, 0) if team is None else (team.held(outline), team.extra_bytes)


def plan(
    team: Team | None, sizes: tuple[int, int], options: LoadOptions, adapters: Sequence[Adapter]
) -> None:
    """What the other ranks plan for, if there are any. `sizes`: tokens of context, and of a chunk. Raises
    PeerError."""
    if team is not None:
        team.plan(*sizes, options, adapters)


def steps_of(
    team: Team | None, made: Pack
) -> tuple[Pack, Forward, Callable[[PeerError], None] | None]:
    """The model's pack, what runs its steps, and what has lost ranks come again. `made`: this rank's."""
    return (made, lazy, None) if team is None else (team.whole, team.forward, team.again)


def table_key(pack: Pack, world: int) -> str:
    """Of the table of cuts."""
    return f"{pack.source.identity}-{world}"


def run_with(
    team: Team | None, loaded: Loaded, make: Callable[[Loaded, Collective | None], Transformer]
) -> Transformer:
    """The leader's model, or one without others. Raises PeerError."""
    if team is None:
        return make(loaded, None)
    with_others = team.connect()
    model = make(loaded, with_others.ranks)
    model.relay = with_others.relay
    team.begin(model)
    loaded.ends.append(team.close)
    return model
