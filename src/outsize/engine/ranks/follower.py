"""A rank that follows: comes to a leader, cuts and loads what it is told to, and runs the leader's steps."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from outsize.checkpoint.typed_json import read
from outsize.engine.ranks.adapters import taken
from outsize.engine.ranks.how import Joined, address, extra_bytes, joined
from outsize.engine.ranks.speed import bytes_per_s
from outsize.engine.ranks.sync import hear, held_bytes
from outsize.engine.ranks.talk import Talk, digest, field, telling
from outsize.engine.threads import kernel_threads
from outsize.errors import PackError, PeerError
from outsize.forward import runahead
from outsize.forward.lead import follow
from outsize.home import home
from outsize.kernels.backend import Backend
from outsize.log import say, silent
from outsize.model.lora import Adapter
from outsize.model.lora_file import read_adapter
from outsize.model.transformer import Transformer
from outsize.model_parts import Shard
from outsize.options import LoadOptions
from outsize.pack import store
from outsize.pack.format import Pack
from outsize.pack.outline import head_of, of_pack
from outsize.parallel.meeting import Hello, Mesh, join
from outsize.parallel.points import Points
from outsize.parallel.shard import cut, following
from outsize.parallel.spec import ParallelSpec, parse_parallel
from outsize.parallel.transport import LOOK_S, SILENCE_S
from outsize.plan import decide, probe
from outsize.plan.placement import Placement
from outsize.plan.warmup import runtime_bytes
from outsize.progress import bars
from outsize.system import memory
from outsize.weights import load as weights
from outsize.weights.open_pack import LoadPlan
from outsize.weights.residency import Share

COMING_S = 60.0  # that a leader may take to listen


@dataclass(frozen=True, slots=True)
class Told:
    """What a rank runs, as the leader says."""

    shard: Pack
    spec: ParallelSpec
    points: Points


@dataclass(frozen=True, slots=True)
class Settings:
    """How, and where."""

    options: LoadOptions
    size: int  # bytes of memory
    native: Backend
    adapters: tuple[Adapter, ...] = ()  # in the leader's order


def run(where: str, options: LoadOptions) -> None:
    """Until the leader ends. Raises OutsizeError; PeerError if it is lost."""
    probe.set_threads(options.threads)
    host, port = address(where)
    own = Settings(options, memory.parse(options.memory), decide.compiled(options))
    tell = silent if options.quiet else say
    mesh = join(host, port, Hello(digest(own.native)), COMING_S)
    try:
        talk = Talk(mesh)
        tell(f"rank {talk.rank} of {talk.world}, with the leader at {where}")
        with telling(talk):
            told = _prepare(talk, own)
            own, placement = _placed(talk, told, own)
        talk.say(0, {"fits": True})
        talk.hear(0)
        transport = told.spec.slowed(talk.transport(told.spec.over))
        run_with = joined(told.spec, transport, own.native, told.points)
        with _opened(told.shard, own, placement, run_with) as model:
            tell("its weights are there")
            run_steps = runahead.follow if told.spec.way.cut == "whole" else follow
            run_steps(model, transport, own.adapters)
            _see_off(mesh)
    except BaseException as e:
        mesh.close(e)
        if options.quiet and isinstance(e, PeerError) and e.rank == 0:
            sys.exit(e.exit_status)  # the leader, which started this one, has said why
        raise
    mesh.close()


def _see_off(mesh: Mesh) -> None:
    """Stay until the leader has left: it may still hear of others."""
    until = time.monotonic() + SILENCE_S
    with suppress(PeerError):
        while time.monotonic() < until:
            mesh.watch.check()
            time.sleep(LOOK_S / 10)


def _prepare(talk: Talk, own: Settings) -> Told:
    """What it has is told; what it is to have is cut."""
    told = talk.hear(0)
    pack = _found(field(told, "identity", str, 0), field(told, "layout", str, 0), str(told["name"]))
    speed = bytes_per_s(pack, own.native) if told.get("measured") is True else 1.0
    runtime, threads = runtime_bytes(own.native), torch.get_num_threads()
    talk.say(0, {"memory": own.size, "runtime": runtime, "threads": threads, "speed": speed})
    told = talk.hear(0)
    try:
        shard: Shard = read(Shard, told.get("shard"), "shard")
    except ValueError as e:
        raise PeerError(f"rank 0 sent a share that is none ({e})", 0) from None
    points = hear(talk, told)
    with bars(own.options.quiet) as progress:
        made = cut(pack, shard, home(), progress)
    torch.set_num_threads(field(told, "threads", int, 0))
    return Told(made, parse_parallel(field(told, "parallel", str, 0)), points)


def _found(identity: str, layout: str, name: str) -> Pack:
    """The leader's pack, made here before. Raises PackError."""
    for pack in store.packs(home() / "packs"):
        if isinstance(pack, Pack):
            source = pack.source
            if (source.identity, source.layout) == (identity, layout):
                return pack
    raise PackError(
        f"there is no pack here of the leader's model ({name[:200]}, {identity[:12]}): pack the very same "
        f"file in the same way with `outsize pack`; packs are in {home()}"
    )


def _placed(talk: Talk, what: Told, own: Settings) -> tuple[Settings, Placement]:
    """With the leader's settings, and adapters. Raises BudgetError, AdapterError."""
    told, shard = talk.hear(0), what.shard
    fields: dict[str, Any] = {
        "context": int, "chunk": int, "kv": str, "verify": str, "streams": int, "force": bool,
    }  # fmt: skip
    asked = {name: field(told, name, kind, 0) for name, kind in fields.items()}
    options = replace(own.options, draft="none", prefix_cache="off", **asked)
    runtime = runtime_bytes(own.native) + extra_bytes(
        what.spec, what.points, shard.description, talk.world
    )
    outline = following(of_pack(shard))
    held = held_bytes(what.points, outline.description, outline.activation_bytes)
    with taken(talk, told) as files:
        outline = decide.with_all(replace(outline, held=held), files, None, None)
        placement = decide.decide(outline, options, own.size, runtime, 0)
        adapters = tuple(read_adapter(shard, name, path) for name, path in files.items())
    shares = {**placement.shares, head_of(outline.description): Share((), 0)}
    own = replace(own, options=options, adapters=adapters)
    return own, replace(placement, shares=shares)


@contextmanager
def _opened(
    shard: Pack, own: Settings, placement: Placement, run_with: Joined
) -> Iterator[Transformer]:
    """Its model, with its weights."""
    options = own.options
    with bars(options.quiet) as progress:
        plan = LoadPlan(placement.shares, options.verify)
        loaded = weights.load(shard, own.native, plan, progress)
    try:
        threads = kernel_threads(options, shard, own.native)
        d = shard.description.for_context(placement.context)
        model = Transformer(d, loaded, own.native, placement.ceiling, threads, run_with.ranks)
        model.relay = run_with.relay
        model.chunk, model.kv = options.chunk or model.chunk, options.kv
        yield model
    finally:
        loaded.close()
