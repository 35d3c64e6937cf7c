"""The transport over torch.distributed: a gloo process group of its own, point to point.

gloo opens connections between all ranks at addresses of its choice. They are told over the authenticated
connections of a Mesh, by a Store that is written here: no TCPStore listens, and nothing is unpickled. gloo's
own connections know no secret: an address that others can reach must be one of a private link.

gloo says that a connection broke, not whose, and waits for ever for a rank that is silent; both are the
watch's to know (watch.py).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_distributed
from torch import Tensor

from outsize.parallel.frames import Channel, Kind
from outsize.parallel.meeting import Mesh
from outsize.parallel.transport import Buffer, Sending, Wire

FOREVER = timedelta(days=30)  # the watch ends what waits
DATA, ALARM = 0, 1  # tags of messages


class _Addresses(torch_distributed.Store):  # type: ignore[name-defined,misc]
    """Where gloo's ranks listen: what each sets, all are told over the mesh."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self._mesh, self._known = mesh, dict[str, bytes]()

    def set(self, key: str, value: str | bytes) -> None:
        raw = value.encode("latin-1") if isinstance(value, str) else bytes(value)
        self._known[key] = raw
        told = json.dumps({"key": key, "value": raw.hex()}).encode()
        for channel in self._mesh.data.values():
            channel.say(Kind.ADDRESS, told)

    def get(self, key: str) -> bytes:
        while key not in self._known:
            for channel in self._mesh.data.values():
                self._hear(channel)
        return self._known[key]

    def _hear(self, channel: Channel) -> None:
        """Each rank sets as many keys as this one."""
        kind, payload = channel.hear()
        try:
            told = json.loads(payload)
            self._known[str(told["key"])] = bytes.fromhex(told["value"])
        except (ValueError, KeyError, TypeError):
            raise channel.error("sent an address that is none") from None
        if kind is not Kind.ADDRESS:
            raise channel.error(f"sent a message of kind {int(kind)} where an address was to come")

    def wait(self, keys: Sequence[str], timeout: timedelta = FOREVER) -> None:
        for key in keys:
            self.get(key)


class Gloo:
    """A Transport over a gloo group between the ranks of a Mesh. The buffers of what is sent are read until
    the call, or `wait`, returns."""

    def __init__(self, mesh: Mesh) -> None:
        self.rank, self.world, self.wire = mesh.rank, mesh.world, Wire()
        self._mesh, self._watch = mesh, mesh.watch
        self.group = _group(mesh)
        self._watch.on_loss.append(self._alarm)

    def exchange(self, out: Buffer, into: Mapping[int, Buffer]) -> None:
        self.scatter(dict.fromkeys(into, out), into)

    def scatter(self, out: Mapping[int, Buffer], into: Mapping[int, Buffer]) -> None:
        with self.waiting():
            work = [self.group.recv([_tensor(b)], r, DATA) for r, b in into.items() if len(b)]
            work += [self.group.send([_tensor(b)], r, DATA) for r, b in out.items() if len(b)]
            for one in work:
                one.wait()
        self._sent(out)
        self.wire.received += sum(map(len, into.values()))

    def send(self, to: int, out: Buffer) -> Sending:
        self._sent({to: out})
        with self.waiting():
            return _Going(self, [self.group.send([_tensor(out)], to, DATA)] if len(out) else [])

    def receive(self, of: int, into: Buffer) -> None:
        self.scatter({}, {of: into})

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time, and names the rank when gloo says that something broke."""
        start = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            raise self._watch.broken(None, f"broke off ({str(error)[:200]})") from None
        finally:
            self.wire.waited_s += time.perf_counter() - start

    def _sent(self, out: Mapping[int, Buffer]) -> None:
        self.wire.messages += len(out)
        self.wire.sent += sum(map(len, out.values()))

    def _alarm(self, rank: int) -> None:
        """A rank is lost, perhaps without a word to gloo: a receive that is late ends all that waits."""
        with contextlib.suppress(RuntimeError):
            self.group.recv([_tensor(bytearray(1))], rank, ALARM).wait(timedelta(milliseconds=1))

    def close(self) -> None:
        self._mesh.close()


class _Going:
    def __init__(self, transport: Gloo, work: list[Any]) -> None:
        self._transport, self._work = transport, work

    def wait(self) -> None:
        with self._transport.waiting():
            while self._work:
                self._work.pop().wait()


def _tensor(buffer: Buffer) -> Tensor:
    """The same memory; a copy of what may not be written, which torch does not take."""
    writable = buffer if not memoryview(buffer).readonly else bytearray(buffer)
    return torch.frombuffer(writable, dtype=torch.uint8)


def _group(mesh: Mesh) -> Any:
    """A ProcessGroupGloo, of which torch's stubs know half."""
    host = next(iter(mesh.data.values())).sock.getsockname()[0]
    torch_gloo: Any = torch_distributed.ProcessGroupGloo
    torch_options = torch_gloo._Options()
    torch_options._devices = [torch_gloo.create_device(hostname=host)]
    torch_options._threads, torch_options._timeout = 1, FOREVER
    try:
        return torch_distributed.ProcessGroupGloo(
            _Addresses(mesh), mesh.rank, mesh.world, torch_options
        )
    except RuntimeError as error:
        raise mesh.watch.broken(None, f"did not come to gloo ({str(error)[:200]})") from None
