"""How ranks find each other: one listens, the others come to it, and then each is connected to each.

    leader = Meeting("10.0.0.1", 7700); mesh = leader.gather(Hello(world=2, digest=...))
    mesh = join("10.0.0.1", 7700, Hello(digest=...))

Every connection begins with the greeting of secret.py; then a HELLO in JSON, of bounded length: the version
of outsize, the rank asked for or none, the number of ranks or none, and a digest of whatever must be the same
everywhere. The leader refuses who differs, in a sentence that the other raises, and goes on waiting. No part
of it is pickled, no store of torch's is opened to the network.
"""

from __future__ import annotations

import json
import socket
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from outsize.errors import PeerError
from outsize.parallel.frames import Channel, Kind
from outsize.parallel.secret import check_address, greet, secret
from outsize.parallel.transport import SILENCE_S, others
from outsize.parallel.watch import Watch
from outsize.version import __version__

WAIT_S = 600.0  # for all ranks to come
TRY_S = 0.1
PURPOSES = ("watch", "data")  # the two connections of each pair
Said = Callable[[str], None]


@dataclass(frozen=True)
class Hello:
    """What a rank says of itself. `digest`: a text, alike on all; `rank`, `world`: none to be told."""

    digest: str = ""
    world: int | None = None
    rank: int | None = None
    version: str = __version__

    def text(self, port: int) -> bytes:
        """In JSON; `port`: where this rank listens."""
        return json.dumps({**self.__dict__, "port": port}).encode()


class Mesh:
    """A rank's connections to all others, and the watch over them. `close` is safe to call twice."""

    def __init__(self, rank: int, world: int, links: dict[tuple[int, str], Channel]) -> None:
        self.rank, self.world = rank, world
        self.data = {r: links[r, "data"] for r in others(rank, world)}
        self.watch = Watch({r: links[r, "watch"] for r in others(rank, world)})
        weakref.finalize(self, self.watch.close)  # also when the process ends

    def close(self, why: BaseException | None = None) -> None:
        """End; the others are told why."""
        self.watch.close(why)
        for channel in self.data.values():
            channel.close()


class Meeting:
    """The leader's side: rank 0. Listens from the start, so that `port` may be 0 and is known then."""

    def __init__(self, host: str, port: int, key: str | None = None) -> None:
        """`key`: the secret; None: the environment's. Raises OptionError for an address that needs a secret,
        PeerError if it cannot be listened at."""
        self._key = secret() if key is None else key.encode()
        check_address(host, self._key)
        self._server = _listen(host, port)
        self.port = int(self._server.getsockname()[1])
        self._came: dict[int, tuple[Channel, int]] = {}  # and the port that the rank listens at

    def gather(self, hello: Hello, wait_s: float = WAIT_S, say: Said = lambda _: None) -> Mesh:
        """Wait for the other ranks. `say` is given a line for each that comes or is refused."""
        deadline, came = time.monotonic() + wait_s, self._came
        with ExitStack() as ended:
            ended.callback(self.close)
            while missing := [r for r in others(0, hello.world or 1) if r not in came]:
                try:
                    channel = _accept(self._server, deadline, self._key, say)
                except TimeoutError:
                    raise PeerError(
                        f"after {wait_s:g} s rank {missing[0]} of {hello.world} had not come; start it with "
                        "`outsize join`",
                        missing[0],
                    ) from None
                say(self._seat(channel, hello, missing))
            ports = {rank: port for rank, (_, port) in came.items()}
            for rank, (channel, _) in came.items():
                peers = {r: (came[r][0].host, port) for r, port in ports.items() if r < rank}
                welcome = {"rank": rank, "world": hello.world, "peers": peers}
                channel.say(Kind.WELCOME, json.dumps(welcome).encode())
            links = {(rank, "watch"): channel for rank, (channel, _) in came.items()}
            mesh = _complete(0, hello.world or 1, links, self._server, self._key)
            ended.pop_all()
            return mesh

    def _seat(self, channel: Channel, ours: Hello, free: list[int]) -> str:
        """Give who came a rank, or refuse it. Returns what happened."""
        try:
            told = _told(channel, Kind.HELLO)
            if (wrong := _difference(ours, told, free)) is not None:
                channel.say(Kind.REFUSED, json.dumps({"why": wrong}).encode())
                raise channel.error(f"was refused: {wrong}")
            rank = next(r for r in free if told.get("rank") in (None, r))
            channel.named(rank)
            self._came[rank] = channel, told["port"]
            return f"{channel.who} is there"
        except PeerError as error:
            channel.close()
            return str(error)

    def close(self) -> None:
        self._server.close()
        for channel, _ in self._came.values():
            channel.close()


def join(host: str, port: int, hello: Hello, wait_s: float = WAIT_S) -> Mesh:
    """Come to the leader and be connected to all. Raises PeerError if refused, with the leader's sentence."""
    key = secret()
    check_address(host, key)
    with ExitStack() as ended:  # closes what is open if anything fails
        sock = ended.enter_context(_connect(host, port, wait_s))
        leader = greet(sock, connected=True, key=key)
        leader.named(0)
        server = ended.enter_context(_listen(sock.getsockname()[0], 0))
        leader.say(Kind.HELLO, hello.text(port=server.getsockname()[1]))
        sock.settimeout(wait_s)
        rank, world, peers = _seated(leader, _told(leader, Kind.WELCOME))
        links = {(0, "watch"): leader}
        for lower, (there, at) in {0: (host, port), **peers}.items():
            for purpose in PURPOSES:
                if (lower, purpose) not in links:
                    more = ended.enter_context(_connect(there, at, wait_s))
                    channel = greet(more, connected=True, key=key)
                    channel.named(lower)
                    channel.say(Kind.HELLO, json.dumps({"rank": rank, "purpose": purpose}).encode())
                    links[lower, purpose] = channel
        mesh = _complete(rank, world, links, server, key)
        ended.pop_all()
        return mesh


def _seated(leader: Channel, told: dict[str, Any]) -> tuple[int, int, dict[int, tuple[str, int]]]:
    """This rank, how many there are, and where the ranks between 0 and this one listen."""
    try:
        peers = {int(r): (str(host), int(port)) for r, (host, port) in told["peers"].items()}
        return int(told["rank"]), int(told["world"]), peers
    except (KeyError, TypeError, ValueError, AttributeError):
        raise leader.error("sent a welcome that is none") from None


def _complete(
    rank: int,
    world: int,
    links: dict[tuple[int, str], Channel],
    server: socket.socket,
    key: bytes | None,
) -> Mesh:
    """Wait for the connections of higher ranks that are not there yet."""
    every = [(r, p) for r in range(rank + 1, world) for p in PURPOSES]
    wanted = [pair for pair in every if pair not in links]
    deadline = time.monotonic() + 2 * SILENCE_S
    while wanted:
        try:
            channel = _accept(server, deadline, key, lambda _: None)
            told = _told(channel, Kind.HELLO)
        except TimeoutError:
            lost = min(r for r, _ in wanted)
            raise PeerError(
                f"rank {lost} came to the leader, but not to rank {rank}", lost
            ) from None
        pair = told.get("rank"), told.get("purpose")
        if pair not in wanted:
            channel.close()
            continue
        wanted.remove(pair)
        channel.named(pair[0])
        links[pair] = channel
    server.close()
    return Mesh(rank, world, links)


def _difference(ours: Hello, told: dict[str, Any], free: list[int]) -> str | None:
    """Why who says this cannot be one of us."""
    for name, mine in (("version", ours.version), ("digest", ours.digest)):
        if told.get(name) != mine:
            theirs = str(told.get(name))[:80]
            return f"its {name} is {theirs!r} and the leader's {mine[:80]!r}: ranks must be alike"
    if told.get("world") not in (None, ours.world):
        return f"it expects {told.get('world')} ranks and the leader {ours.world}"
    if told.get("rank") is not None and told["rank"] not in free:
        return f"rank {told['rank']} is taken, or not one of 1 to {(ours.world or 1) - 1}"
    if not (isinstance(port := told.get("port"), int) and 0 < port < 65536):
        return f"it listens at port {port!r}, which is none"
    return None


def _told(channel: Channel, wanted: Kind) -> dict[str, Any]:
    kind, payload = channel.hear()
    try:
        told = json.loads(payload)
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise channel.error("sent what is no JSON object")
    if kind is Kind.REFUSED:
        raise channel.error(f"refused this rank: {str(told.get('why'))[:500]}")
    if kind is not wanted:
        raise channel.error(f"sent a message of kind {int(kind)} where {int(wanted)} was to come")
    return told


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise PeerError(f"cannot listen at {host}:{port} ({error.strerror})") from None


def _accept(server: socket.socket, deadline: float, key: bytes | None, say: Said) -> Channel:
    """The next that knows the secret. Raises TimeoutError."""
    while True:
        server.settimeout(max(deadline - time.monotonic(), 0.01))
        sock, _ = server.accept()
        try:
            return greet(sock, connected=False, key=key)
        except (PeerError, OSError) as error:
            sock.close()
            say(str(error))


def _connect(host: str, port: int, wait_s: float) -> socket.socket:
    """Try until someone listens there."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return socket.create_connection((host, port), timeout=5)
        except OSError as error:
            if time.monotonic() > deadline:
                raise PeerError(
                    f"nobody listens at {host}:{port} ({error.strerror or error}): start the leader with "
                    "`--listen HOST:PORT`",
                    0,
                ) from None
            time.sleep(TRY_S)
