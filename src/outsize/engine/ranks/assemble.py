"""How the ranks of a model that is being opened come together, and what each is given of it."""

from __future__ import annotations

import secrets
from contextlib import ExitStack

import torch

from outsize.engine.ranks.children import Children
from outsize.engine.ranks.how import address
from outsize.engine.ranks.leader import Team
from outsize.engine.ranks.meet import How, introduced
from outsize.engine.ranks.speed import bytes_per_s
from outsize.engine.ranks.sync import find
from outsize.engine.ranks.talk import Talk, digest, field
from outsize.errors import OptionError
from outsize.kernels.backend import Backend
from outsize.log import say, silent, warn
from outsize.options import LoadOptions
from outsize.pack.format import Pack
from outsize.pack.outline import of_pack
from outsize.parallel.meeting import Hello, Meeting
from outsize.parallel.spec import parse_parallel
from outsize.parallel.split import UNCUT, Ranks, check, split
from outsize.plan.rank_room import most_parts
from outsize.system import memory

CHILDREN_S = 120.0  # for ranks on this machine to come
HOST = "127.0.0.1"


def assemble(pack: Pack, options: LoadOptions, backend: Backend) -> Team:
    """Bring the ranks together, and share the model out. Nothing of the weights is read. Raises OptionError,
    UnsupportedError, PeerError."""
    spec = parse_parallel(options.parallel)
    check(pack.path.name, pack.description, options.ranks, spec.way)
    if spec.shares and len(spec.shares) != options.ranks:
        raise OptionError(
            f"cuts={spec.cuts} gives {len(spec.shares)} shares of a prompt, and there are {options.ranks} "
            "ranks; give each one, first the first of the chain (rank 1), last the leader"
        )
    sync = find(spec, pack, options.ranks)
    if (cost := sync.lossy(spec)) and not options.quiet:
        warn(cost)
    size = memory.parse(options.memory)
    told = silent if options.quiet else say
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
            told(
                f"waiting for {options.ranks - 1} ranks; start each with `outsize join "
                f"{host}:{meeting.port}`"
            )
        hello = Hello(digest(backend), options.ranks)
        wait = {} if children is None else {"wait_s": CHILDREN_S}
        mesh = meeting.gather(hello, say=silent if children else told, **wait)
        talk = Talk(mesh)
        try:
            team = _shared_out(pack, talk, How(spec, backend, sync, options))
        except BaseException as e:
            mesh.close(e)
            raise
        ended.pop_all()
        team.owns(children)
        return team


def _shared_out(pack: Pack, talk: Talk, how: How) -> Team:
    spec, options = how.spec, how.options
    measured = options.listen is not None  # ranks of one machine are alike
    own_speed = bytes_per_s(pack, how.backend) if measured else 1.0
    own = {"memory": memory.parse(options.memory), "runtime": memory.resident()}
    own |= {"threads": torch.get_num_threads()}
    told = [own | {"speed": own_speed}, *introduced(talk, pack, measured).values()]
    speeds = tuple(max(1e-9, field(t, "speed", float, r)) for r, t in enumerate(told))
    sizes = [
        {k: field(t, k, int, r) for k in ("memory", "runtime", "threads")}
        for r, t in enumerate(told)
    ]
    whole = of_pack(pack)
    most = tuple(
        most_parts(whole, t, r == 0, (options.context, spec.way)) for r, t in enumerate(sizes)
    ) if spec.way.cut not in UNCUT else ()  # fmt: skip
    ranks = Ranks(speeds, most)
    shards = split(pack.path.name, pack.description, pack.tables, ranks, how.sync.way)
    torch.set_num_threads(min(t["threads"] for t in sizes))  # torch's products depend on it
    team = Team(pack, shards, talk, how)
    team.tell_shards()
    return team
