"""The reading threads of kernels/csrc/reads.c: how they ask to be scheduled."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
import time
from pathlib import Path

import pytest

from outsize.kernels.find import native_in
from outsize.storage.native_reader import NativeReader

# The numbers of sched_getattr; sched_setattr's are one less.
GETATTR = {"x86_64": 315, "aarch64": 275}
SHORT = 100_000  # ns


def attributes(thread: int) -> ctypes.Array[ctypes.c_char]:
    """How a thread is scheduled: a sched_attr."""
    room = ctypes.create_string_buffer(48)
    number = ctypes.c_long(GETATTR[platform.machine()])
    ctypes.CDLL(None).syscall(number, thread, room, 48, 0)
    return room


def slice_of(thread: int) -> int:
    """Nanoseconds of a thread's turns; 0 where the kernel does not tell."""
    return int(struct.unpack_from("<IIQiIQ", attributes(thread))[5])


def may_ask() -> bool:
    """Some sandboxes let nobody ask."""
    number = ctypes.c_long(GETATTR[platform.machine()] - 1)
    return int(ctypes.CDLL(None).syscall(number, 0, attributes(0), 0)) == 0


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in GETATTR, reason="asks Linux's scheduler"
)
def test_readers_have_short_turns(home: Path) -> None:
    """So that they are let in while others compute."""
    if (made := native_in(home / "native")) is None:
        pytest.skip("no compiler: the readers are Python's")
    if not slice_of(0):
        pytest.skip("Linux before 6.12 has no turns of a thread's own")
    if not may_ask():
        pytest.skip("this sandbox forbids sched_setattr")
    before, reads = set(os.listdir("/proc/self/task")), NativeReader(made.library, 3)
    try:
        new = [int(t) for t in set(os.listdir("/proc/self/task")) - before]
        assert len(new) == 3
        until = time.monotonic() + 5
        while {slice_of(t) for t in new} != {SHORT} and time.monotonic() < until:
            time.sleep(0.01)  # each asks when it begins
        assert {slice_of(t) for t in new} == {SHORT}
        assert slice_of(0) > SHORT
    finally:
        reads.close()
