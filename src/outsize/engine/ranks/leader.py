"""The leader: waits for ranks or starts them, shares the model out, and tells each what is its."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch

from outsize.draft.spec import parse_draft
from outsize.engine.ranks.children import Children
from outsize.engine.ranks.speed import bytes_per_s, most_parts
from outsize.engine.ranks.talk import Talk, digest, field
from outsize.errors import OptionError, PeerError
from outsize.forward.lead import Lead
from outsize.forward.relay import Relay
from outsize.kernels.backend import Backend
from outsize.kernels.turned import turner
from outsize.log import say, silent, warn
from outsize.model.transformer import Transformer
from outsize.model_parts import Shard
from outsize.options import LoadOptions
from outsize.pack.format import Pack
from outsize.pack.outline import of_pack
from outsize.parallel.collective import Collective
from outsize.parallel.exact import Exact
from outsize.parallel.lowbit import LowBit, Turned
from outsize.parallel.meeting import Hello, Meeting
from outsize.parallel.shard import cut
from outsize.parallel.spec import ParallelSpec, parse_parallel
from outsize.parallel.split import Ranks, check, split
from outsize.parallel.transport import Transport
from outsize.plan import probe
from outsize.progress import bars
from outsize.system import memory
from outsize.weights.load import Loaded
from outsize.weights.neuron_spec import OFF

CHILDREN_S = 120.0  # for ranks on this machine to come
HOST = "127.0.0.1"


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
    given = {
        "experts": options.experts is not None and spec.way.cut != "layers",
        "neurons": options.neurons != OFF,
        "prefill": options.prefill != "full",
        "adapters": bool(options.adapters),
        "draft": parse_draft(options.draft).kind == "mtp",
    }
    for name, is_given in given.items():
        if is_given:
            value = getattr(options, name)
            shown = ", ".join(value) if name == "adapters" else value
            raise OptionError(
                f"{name} is {shown}, which several ranks do not run; leave it out, or --ranks"
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


def joined(spec: ParallelSpec, transport: Transport, backend: Backend) -> Joined:
    """As the spec says."""
    if spec.way.cut == "layers":
        return Joined(None, Relay(transport))
    exact = Exact(transport)
    if spec.bits == 16:
        return Joined(exact, None)
    codec = Turned(turner(spec.bits, backend))
    return Joined(LowBit(exact, lambda at: codec), None)


def keeps_all(spec: ParallelSpec) -> bool:
    """Has each rank all keys and values?"""
    return spec.way.attention == "whole" and spec.way.cut != "layers"


class Team:
    """The ranks of a model that is being opened, and then runs. Close it."""

    def __init__(
        self,
        pack: Pack,
        shards: tuple[Shard, ...],
        talk: Talk,
        how: tuple[ParallelSpec, Backend],
    ) -> None:
        """`pack`: the model's."""
        self.whole, self.shards, self._talk = pack, shards, talk
        self._spec, self._backend = how
        self.lead: Lead | None = None
        self._children: Children | None = None
        self._lock = threading.Lock()

    def cut(self, home: Path, quiet: bool) -> Pack:
        """The leader's own shard, while the others cut theirs. Raises PackError, DiskFullError."""
        with bars(quiet) as progress:
            return cut(self.whole, self.shards[0], home, progress)

    def plan(self, context: int, chunk: int, options: LoadOptions) -> None:
        """What the others plan for. Raises PeerError where one of them has no room."""
        told = {"context": context, "chunk": chunk}
        names = "kv", "verify", "streams", "force"
        self._talk.say_all({**told, **{name: getattr(options, name) for name in names}})
        self._talk.hear_all()

    def connect(self) -> Joined:
        """What its model is run with. Raises PeerError."""
        self._talk.say_all({"go": True})
        transport = self._talk.transport(self._spec.over)
        self.lead = Lead(transport, keeps_all(self._spec))
        return joined(self._spec, transport, self._backend)

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


def run_with(
    team: Team | None, loaded: Loaded, make: Callable[[Loaded, Collective | None], Transformer]
) -> Transformer:
    """The leader's model, or one without others. Raises PeerError."""
    if team is None:
        return make(loaded, None)
    with_others = team.connect()
    model = make(loaded, with_others.ranks)
    model.leader, model.relay = team.lead, with_others.relay
    loaded.ends.append(team.close)
    return model


def assemble(pack: Pack, options: LoadOptions, backend: Backend) -> Team:
    """Bring the ranks together, and share the model out. Nothing of the weights is read. Raises OptionError,
    UnsupportedError, PeerError."""
    spec = parse_parallel(options.parallel)
    check(pack.path.name, pack.description, options.ranks, spec.way)
    if spec.lossy and not options.quiet:
        warn(f"{spec.lossy} is lossy: answers change a little; leave it out for equal ones")
    size = memory.parse(options.memory)
    tell = silent if options.quiet else say
    with ExitStack() as ended:
        host, port = address(options.listen) if options.listen else (HOST, 0)
        key = None if options.listen else secrets.token_hex(16)
        meeting = Meeting(host, port, key)
        children = None
        if key is not None:
            arguments = ["--memory", str(size), "--threads", str(options.threads), "-q"]
            arguments += [] if options.native else ["--no-native"]
            children = Children(options.ranks - 1, meeting.port, key, arguments)
            ended.callback(children.close)
        else:
            tell(
                f"waiting for {options.ranks - 1} ranks; start each with `outsize join "
                f"{host}:{meeting.port}`"
            )
        hello = Hello(digest(backend), options.ranks)
        wait = {} if children is None else {"wait_s": CHILDREN_S}
        mesh = meeting.gather(hello, say=silent if children else tell, **wait)
        talk = Talk(mesh)
        try:
            team = _shared_out(pack, options, talk, (spec, backend, size))
        except BaseException as e:
            mesh.close(e)
            raise
        ended.pop_all()
        team.owns(children)
        return team


def _shared_out(
    pack: Pack, options: LoadOptions, talk: Talk, how: tuple[ParallelSpec, Backend, int]
) -> Team:
    spec, backend, size = how
    measured = options.listen is not None  # ranks of one machine are alike
    source = pack.source
    told_of = {"identity": source.identity, "layout": source.layout, "name": source.spec}
    talk.say_all({**told_of, "measured": measured})
    own_speed = bytes_per_s(pack, backend) if measured else 1.0
    own = {"memory": size, "runtime": memory.resident(), "threads": torch.get_num_threads()}
    told = [own | {"speed": own_speed}, *talk.hear_all().values()]
    speeds = tuple(max(1e-9, field(t, "speed", float, r)) for r, t in enumerate(told))
    sizes = [
        {k: field(t, k, int, r) for k in ("memory", "runtime", "threads")}
        for r, t in enumerate(told)
    ]
    whole = of_pack(pack)
    most = tuple(
        most_parts(whole, t, r == 0, (options.context, spec.way)) for r, t in enumerate(sizes)
    )
    shards = split(pack.path.name, pack.description, pack.tables, Ranks(speeds, most), spec.way)
    threads = min(t["threads"] for t in sizes)  # torch's products depend on it
    torch.set_num_threads(threads)
    for rank in talk.mesh.data:
        talk.say(rank, {"shard": asdict(shards[rank]), "threads": threads, "parallel": str(spec)})
    return Team(pack, shards, talk, (spec, backend))


def address(text: str) -> tuple[str, int]:
    """Of HOST:PORT. Raises OptionError."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise OptionError(f"{text!r} is no address; HOST:PORT is expected, as in 10.0.0.1:7700")
    return host.strip("[]"), int(port)
