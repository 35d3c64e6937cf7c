"""The transport for short messages: one plain TCP connection to each rank, both ways at once.

Each message is one frame (frames.py). All connections are served in one loop without blocking, so that two
ranks that send each other more than the kernel holds do not wait for each other. One thread may send while
another receives.
"""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Mapping, Sequence

from outsize.parallel.frames import HEAD, Channel, Kind
from outsize.parallel.meeting import Mesh
from outsize.parallel.transport import LOOK_S, Buffer, Sending, Wire

READ, WRITE = select.POLLIN | select.POLLHUP | select.POLLERR, select.POLLOUT


class _Moving:
    """One message on its way through a socket: the pieces that are left."""

    def __init__(self, channel: Channel, pieces: list[memoryview]) -> None:
        self.channel, self.left = channel, pieces

    def move(self) -> bool:
        """Send or receive what goes without waiting. Is all of it done?"""
        while self.left:
            try:
                count = self.step()
            except BlockingIOError:
                return False
            except OSError as error:
                raise ConnectionError(error.strerror or str(error)) from None
            while self.left and count >= len(self.left[0]):
                count -= len(self.left.pop(0))
            if count:
                self.left[0] = self.left[0][count:]
        return True

    def step(self) -> int:
        raise NotImplementedError


class _Going(_Moving):
    def __init__(self, channel: Channel, out: Buffer) -> None:
        super().__init__(channel, channel.frame(Kind.DATA, out))

    def step(self) -> int:
        return self.channel.sock.sendmsg(self.left)


class _Coming(_Moving):
    def __init__(self, channel: Channel, into: Buffer) -> None:
        self.head, self.into, self.tag = bytearray(HEAD.size), into, bytearray(channel.tag)
        pieces = [memoryview(b) for b in (self.head, into, self.tag)]
        super().__init__(channel, [p for p in pieces if len(p)])
        self._unseen = HEAD.size

    def step(self) -> int:
        count = self.channel.sock.recvmsg_into(self.left)[0]
        if not count:
            raise ConnectionError("end")
        if self._unseen > 0:  # before waiting for bytes that a wrong frame does not have
            self._unseen -= count
            if self._unseen <= 0:
                self.channel.check_head(self.head, Kind.DATA, len(self.into))
        return count

    def move(self) -> bool:
        done = not self.left
        if not super().move():
            return False
        if not done:
            self.channel.check_tag(self.head, self.into, self.tag)
        return True


class Sockets:
    """A Transport over the connections of a Mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self.rank, self.world, self.wire = mesh.rank, mesh.world, Wire()
        self._mesh, self._watch, self._channels = mesh, mesh.watch, mesh.data
        self._unsent: list[_Going] = []  # in order; moved on by every call
        self._sending = threading.Lock()  # over these
        for channel in self._channels.values():
            channel.sock.setblocking(False)

    def exchange(self, out: Buffer, into: Mapping[int, Buffer]) -> None:
        self.scatter(dict.fromkeys(into, out), into)

    def scatter(self, out: Mapping[int, Buffer], into: Mapping[int, Buffer]) -> None:
        going = [self._start(r, b) for r, b in out.items()]
        self.run([*going, *(_Coming(self._channels[r], b) for r, b in into.items())])
        self.wire.received += sum(map(len, into.values()))

    def send(self, to: int, out: Buffer) -> Sending:
        """What the kernel does not take at once goes on its way within the calls that follow."""
        going = self._start(to, out)
        self._push()
        return _Sending(self, going)

    def receive(self, of: int, into: Buffer) -> None:
        self.run([_Coming(self._channels[of], into)])
        self.wire.received += len(into)

    def _start(self, to: int, out: Buffer) -> _Going:
        channel = self._channels[to]
        self.wire.messages += 1
        self.wire.sent += len(out)
        self.wire.overhead += channel.overhead
        with self._sending:
            going = _Going(channel, out)
            self._unsent.append(going)
        return going

    def run(self, wanted: Sequence[_Moving]) -> None:
        """Until all of these have moved; what else is unsent moves with them."""
        start = time.perf_counter()
        while True:
            self._push()
            coming = [m for m in wanted if isinstance(m, _Coming) and not self._moved(m)]
            if not coming and not any(m.left for m in wanted):
                break
            self._wait(coming)
        self.wire.waited_s += time.perf_counter() - start

    def _push(self) -> None:
        """Send what goes; of each rank in order."""
        stuck = set[Channel]()
        with self._sending:
            for going in self._unsent:
                if going.channel not in stuck and not self._moved(going):
                    stuck.add(going.channel)
            self._unsent = [going for going in self._unsent if going.left]

    def _moved(self, moving: _Moving) -> bool:
        try:
            return moving.move()
        except ConnectionError:
            raise self._watch.broken(moving.channel, "hung up") from None

    def _wait(self, coming: Sequence[_Coming]) -> None:
        """Until something may move; raise if a rank is lost meanwhile."""
        wanted = {m.channel.sock.fileno(): READ for m in coming}
        for going in self._unsent:
            number = going.channel.sock.fileno()
            wanted[number] = wanted.get(number, 0) | WRITE
        if not wanted:
            return  # another thread has sent what this one waited for
        poller = select.poll()
        for number, events in wanted.items():
            poller.register(number, events)
        while not poller.poll(LOOK_S * 1000):
            self._watch.check()

    def close(self) -> None:
        self._mesh.close()


class _Sending:
    def __init__(self, transport: Sockets, going: _Going) -> None:
        self._transport, self._going = transport, going

    def wait(self) -> None:
        self._transport.run([self._going])
