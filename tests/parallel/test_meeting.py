"""Who may be a rank, and what is told to who may not."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest

from outsize.errors import OptionError, PeerError
from outsize.parallel.frames import HEAD, Kind
from outsize.parallel.meeting import Hello, Meeting, Mesh, join
from outsize.parallel.secret import MAGIC, NAME, check_address, greet
from outsize.parallel.transport import LOOK_S, SILENCE_S
from tests.parallel.meet import HERE, meshes

KEY = "0123456789abcdef"


@contextmanager
def leader(hello: Hello, wait_s: float = 3) -> Iterator[tuple[int, list[str]]]:
    """A leader that waits for one rank; yields its port and what it says."""
    meeting, said = Meeting(HERE, 0), list[str]()
    with ThreadPoolExecutor(1) as pool:
        mesh = pool.submit(meeting.gather, hello, wait_s, said.append)
        yield meeting.port, said
        try:
            mesh.result().close()
        except PeerError as error:
            said.append(str(error))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_all_are_connected_to_all(world: int) -> None:
    made = meshes(world)
    assert [m.rank for m in made] == list(range(world))
    for mesh in made:
        assert sorted(mesh.data) == [r for r in range(world) if r != mesh.rank]
        assert all(c.rank == r for r, c in mesh.data.items())
        mesh.close()


def test_with_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, KEY)
    made = meshes(3)
    assert all(c.tag == 16 for m in made for c in m.data.values())
    for mesh in made:
        mesh.close()


def joins(port: int, hello: Hello) -> Mesh:
    return join(HERE, port, hello, 3)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (Hello(digest="b"), "its digest is 'b' and the leader's 'a'"),
        (Hello("a", version="9"), "its version is '9' and the leader's"),
        (Hello("a", world=3), "it expects 3 ranks and the leader 2"),
        (Hello("a", rank=2), "rank 2 is taken, or not one of 1 to 1"),
        (Hello("a", rank=0), "rank 0 is taken"),
    ],
)
def test_who_differs_is_refused_and_the_right_one_still_comes(theirs: Hello, message: str) -> None:
    with leader(Hello("a", world=2)) as (port, said):
        with pytest.raises(PeerError, match=message) as told:
            joins(port, theirs)
        assert told.value.rank == 0
        joins(port, Hello("a")).close()
    assert message in said[0]
    assert said[1] == f"rank 1 ({HERE}) is there"


def test_a_wrong_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, KEY)
    with leader(Hello(world=2), 1) as (port, said):
        monkeypatch.setenv(NAME, KEY[::-1])
        with pytest.raises(
            PeerError, match=r"does not share this rank's secret .*not the one set here"
        ):
            joins(port, Hello())
        monkeypatch.delenv(NAME)
        with pytest.raises(PeerError, match="none is set here"):
            joins(port, Hello())
    assert "does not share" in said[0]
    assert "does not share" in said[1]
    assert said[2] == "after 1 s rank 1 of 2 had not come; start it with `outsize join`"


def until_closed(sock: socket.socket) -> None:
    """What is unread when the other closes comes back as a reset."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(100):
            pass


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (b"GET / HTTP/1.1\r\n\r\n" + bytes(40), "is no rank of outsize"),
        (b"outsize\x09" + bytes(64), "speaks protocol 9 and this version protocol 1"),
        (MAGIC + bytes(10), "hung up in the middle of a message"),
        (b"", "hung up"),
        (MAGIC + bytes(64), "does not share"),
    ],
)
def test_a_stranger(sent: bytes, message: str) -> None:
    """Is not read past its 72 bytes, and does not keep the right one out."""
    with leader(Hello(world=2)) as (port, said):
        with socket.create_connection((HERE, port)) as sock:
            sock.sendall(sent)
            until_closed(sock)
        joins(port, Hello()).close()
    assert message in said[0]


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (HEAD.pack(Kind.HELLO, 1 << 30, 0), "a message of 1073741824 bytes where at most 8192"),
        (HEAD.pack(Kind.HELLO, 100, 0) + b"{", "hung up in the middle"),
        (HEAD.pack(Kind.HELLO, 2, 5) + b"{}", "number 5, where number 0"),
        (HEAD.pack(77, 2, 0) + b"{}", "kind 77"),
        (HEAD.pack(Kind.BEAT, 2, 0) + b"{}", "kind 4 where 1 was to come"),
        (HEAD.pack(Kind.HELLO, 2, 0) + b"[]", "no JSON object"),
        (HEAD.pack(Kind.HELLO, 2, 0) + b"\xff{", "no JSON object"),
    ],
)
def test_a_frame_that_is_none(frame: bytes, message: str) -> None:
    with leader(Hello(world=2)) as (port, said):
        with socket.create_connection((HERE, port)) as sock:
            greet(sock, connected=True, key=None)
            sock.sendall(frame)
            until_closed(sock)
        joins(port, Hello()).close()
    assert message in said[0]


@pytest.mark.parametrize(
    "told", [{"rank": [], "port": 1}, {"rank": True, "port": 0}, {"port": "x"}, {"port": 70000}, {}]
)
def test_a_hello_of_nonsense(told: dict[str, object]) -> None:
    with leader(Hello(world=2)) as (port, said):
        with socket.create_connection((HERE, port)) as sock:
            channel = greet(sock, connected=True, key=None)
            base = {"version": Hello().version, "digest": "", "world": None}
            channel.say(Kind.HELLO, json.dumps({**base, **told}).encode())
            kind, _ = channel.hear()
            assert kind is Kind.REFUSED
        joins(port, Hello()).close()
    assert "was refused" in said[0]


def test_a_frame_changed_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, KEY)
    with leader(Hello(world=2), 1) as (port, said), socket.create_connection((HERE, port)) as sock:
        channel = greet(sock, connected=True, key=KEY.encode())
        frame = b"".join(channel.frame(Kind.HELLO, b"{}"))
        sock.sendall(frame[:-1] + bytes([frame[-1] ^ 1]))
        time.sleep(0.1)
    assert "was changed on its way, or is of someone else" in said[0]


def test_addresses_that_need_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("127.0.0.1", "127.8.8.8", "localhost", "::1"):
        check_address(host, None)
    for host in ("0.0.0.0", "10.1.2.3", "::", "192.168.0.1"):
        check_address(host, b"x")
        with pytest.raises(OptionError, match="ranks elsewhere must share a secret"):
            check_address(host, None)
    with pytest.raises(OptionError, match="is no address"):
        check_address("no such host.invalid", None)
    with pytest.raises(OptionError, match="must share a secret"):
        Meeting("0.0.0.0", 0)
    with pytest.raises(OptionError, match="must share a secret"):
        join("10.1.2.3", 1, Hello())
    monkeypatch.setenv(NAME, "short")
    with pytest.raises(OptionError, match="5 characters and needs 16"):
        Meeting(HERE, 0)


def test_nobody_there() -> None:
    meeting = Meeting(HERE, 0)
    with pytest.raises(PeerError, match="cannot listen at"):
        Meeting(HERE, meeting.port)
    meeting.close()
    with pytest.raises(PeerError, match=f"nobody listens at {HERE}:{meeting.port}"):
        join(HERE, meeting.port, Hello(), 0.2)


def test_a_leader_that_ends_while_others_wait() -> None:
    meeting = Meeting(HERE, 0)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(join, HERE, meeting.port, Hello(), 5)
        with pytest.raises(PeerError, match="rank 2 of 3 had not come"):
            meeting.gather(Hello(world=3), 0.5)
        with pytest.raises(PeerError, match=r"rank 0 .* hung up"):
            coming.result()


def test_the_environment_is_read_at_the_meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, "")
    assert os.environ[NAME] == ""
    for mesh in meshes(2):
        assert mesh.data[1 - mesh.rank].tag == 0
        mesh.close()


def test_who_was_stopped_takes_nobody_for_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slept, or a process that was stopped and goes on, could not have heard of others."""
    made, ahead, clock = meshes(2), [0.0], time.monotonic
    monkeypatch.setattr(
        "outsize.parallel.watch.time", SimpleNamespace(monotonic=lambda: clock() + ahead[0])
    )
    time.sleep(2 * LOOK_S)
    ahead[0] = 6 * SILENCE_S
    time.sleep(4 * LOOK_S)
    for mesh in made:
        mesh.watch.check()
    for mesh in made:
        mesh.close()
