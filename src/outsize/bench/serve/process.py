"""A server's process: started for a measurement, or found by the port that it listens on; and its memory."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from outsize.bench.serve.client import Address
from outsize.errors import UnavailableError
from outsize.system import cgroups

LOOPBACK = "127.0.0.1"
POLL_S, GRACE_S = 0.05, 20.0
TREE_S = 5.0  # between two looks at which processes are below another
PEAKS = "memory.peak", "memory.max_usage_in_bytes"  # of control groups, by version
SETTLED = 0.25  # of the samples are left out of a slope: memory that is taken once


def free_port() -> int:
    """One on which nothing listens now."""
    with socket.socket() as s:
        s.bind((LOOPBACK, 0))
        return int(s.getsockname()[1])


class Server:
    """A server that was started here, as a process of its own; stop it, or use it in a `with`."""

    def __init__(self, command: Sequence[str], address: Address) -> None:
        self.address = address
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `stop`)
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log)

    @classmethod
    def of_outsize(cls, model: str, flags: Sequence[str], wrap: Sequence[str] = ()) -> Server:
        """`outsize serve` on a port of its own; `wrap`: a command that runs it, as one that caps memory."""
        port = free_port()
        own = ["-m", "outsize", "serve", model, "--host", LOOPBACK, "--port", str(port), *flags]
        return cls([*wrap, sys.executable, *own], Address(LOOPBACK, port))

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def check(self) -> None:
        """Raises UnavailableError if the process has ended."""
        if (status := self._process.poll()) is not None:
            raise UnavailableError(
                f"the server ended with status {status}; its last words: {self.words()}"
            )

    def words(self) -> str:
        """The end of what it has printed."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace").strip()[-800:]

    def stop(self, grace_s: float = GRACE_S) -> int:
        """Ask it to end (SIGTERM), and see to it after a while; its exit status."""
        if self._process.poll() is None:
            # The one that listens: a command around it may not pass a signal on.
            _signal(psutil.Process(listener(self.address) or self._process.pid), signal.SIGTERM)
            try:
                self._process.wait(grace_s)
            except subprocess.TimeoutExpired:
                for process in _tree(self._process.pid)[::-1]:
                    _signal(process, signal.SIGKILL)
                self._process.wait()
        self._log.close()
        return self._process.returncode


def _tree(pid: int) -> list[psutil.Process]:
    """A process and those below it; none if it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.Error):
        process.send_signal(number)


def listener(address: Address) -> int | None:
    """The process that listens on a port of this machine; None if it is elsewhere, or not ours to see."""
    if address.host not in (LOOPBACK, "localhost", "::1"):
        return None
    try:
        found = psutil.net_connections("tcp")
    except psutil.Error:
        return None
    here = (c for c in found if c.status == psutil.CONN_LISTEN)
    return next((c.pid for c in here if c.laddr and c.laddr.port == address.port), None)


class Memory:
    """What a process and those below it have of memory that is theirs alone: RssAnon + VmSwap, in bytes."""

    def __init__(self, pid: int | None) -> None:
        self._pid, self._tree, self._looked = pid, list[int](), -math.inf
        self.samples: list[tuple[float, int]] = []  # (time.perf_counter, bytes)

    def sample(self) -> int | None:
        """Look, and remember; None where there is nothing to see."""
        if self._pid is None:
            return None
        now = time.perf_counter()
        if now - self._looked > TREE_S:
            self._tree, self._looked = [process.pid for process in _tree(self._pid)], now
        size = sum(sum(_status(pid, "RssAnon", "VmSwap")) for pid in self._tree)
        if not size:
            return None
        self.samples.append((now, size))
        return size

    async def settled(self) -> int | None:
        """The least within a second: allocators give back a little later."""
        found = list[int]()
        for _ in range(10):
            found += [size for size in [self.sample()] if size is not None]
            await asyncio.sleep(0.1)
        return min(found, default=None)

    @property
    def most(self) -> int | None:
        """Of the samples."""
        return max((size for _, size in self.samples), default=None)

    def peak(self) -> int | None:
        """The most that the process itself has had since its start, mapped files included."""
        return next(iter(_status(self._pid, "VmHWM")), None) if self._pid is not None else None

    def slope(self) -> float:
        """Bytes a second that it grows by, a straight line through all samples but the first quarter; not a
        number with fewer than three."""
        kept = self.samples[int(len(self.samples) * SETTLED) :]
        if len(kept) < 3:
            return math.nan
        mean_t, mean_y = (sum(of) / len(kept) for of in zip(*kept, strict=True))
        across = sum((t - mean_t) * (y - mean_y) for t, y in kept)
        return float(across / sum((t - mean_t) ** 2 for t, _ in kept))

    def group_peak(self) -> int | None:
        """The most that its control group has had, page cache included; None where the system does not say,
        or the group is that of this process, too."""
        if self._pid is None:
            return None
        theirs, _ = next(cgroups.groups("memory", Path(f"/proc/{self._pid}/cgroup")), (None, 0))
        ours, _ = next(cgroups.groups("memory"), (None, 0))
        if theirs is None or theirs == ours:
            return None
        found = (cgroups.number(theirs / name) for name in PEAKS)
        return next((n for n in found if n is not None), None)


def _status(pid: int, *names: str) -> list[int]:
    """Bytes that the system tells of a process; none if it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return []
    wanted = rf"^(?:{'|'.join(names)}):\s*(\d+) kB"
    return [int(n) << 10 for n in re.findall(wanted, text, re.M)]
