"""Memory for large matrices: zeros, in huge pages where the system has them, and no more than was asked
for."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from outsize.storage.buffers import HUGE, whole
from outsize.system.memory import resident

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize("size", [1, 4096, HUGE - 1, HUGE, 3 * HUGE + 5])
def test_a_whole_matrix_is_zeros_of_its_size(size: int) -> None:
    made = whole(size)
    assert made.shape == (size,)
    assert not made.any()
    made.fill_(7)
    assert int(made.sum(dtype=made.long().dtype)) == 7 * size
    assert size < HUGE or made.data_ptr() % HUGE == 0


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_it_takes_no_more_than_its_size() -> None:
    whole(HUGE)  # what is loaded at the first call
    before, size = resident(), 20 * HUGE + HUGE // 2
    made = whole(size)
    assert resident() - before <= size + HUGE // 8
    del made
    assert resident() - before <= HUGE // 8


@pytest.mark.skipif(
    not THP.is_file() or "[never]" in THP.read_text(), reason="this system has no huge pages"
)
def test_it_lies_in_huge_pages() -> None:
    made = whole(8 * HUGE + 4096)
    inside, huge = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            first, last = (int(x, 16) for x in found.groups())
            inside = first < made.data_ptr() + made.numel() and made.data_ptr() < last
        elif inside and line.startswith("AnonHugePages:"):
            huge += int(line.split()[1]) << 10
    assert huge >= 6 * HUGE  # of eight: memory may be in pieces
