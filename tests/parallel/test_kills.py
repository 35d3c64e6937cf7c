"""A rank that is killed or stopped is named by the others, which end: processes over the loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from outsize.parallel.meeting import Meeting

ROOT = Path(__file__).parents[2]


def kills(*told: str) -> list[dict[str, object]]:
    command = [sys.executable, "-m", "experiments.parallel.kills", *told]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert not done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(row["good"] for row in rows), rows
    return rows


SLOW = pytest.param("sockets", marks=pytest.mark.slow)


@pytest.mark.parametrize("transport", ["gloo", SLOW])
def test_three(transport: str) -> None:
    assert len(kills("--trials", "3", "--transport", transport)) == 3


@pytest.mark.parametrize("transport", ["torch", SLOW])
def test_a_rank_that_fails_with_an_exchange_under_way_ends(transport: str) -> None:
    """The first gives up while the thread of its long exchanges waits for the second."""
    meeting = Meeting("127.0.0.1", 0)
    meeting.close()
    command = [sys.executable, "-m", "tests.parallel.leaves"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(meeting.port), transport],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in (0, 1)
    ]
    said = [rank.communicate(timeout=60)[1].strip().splitlines()[-1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert said[0] == "ValueError: not for the wire"
    assert said[1].startswith("outsize.errors.PeerError: rank 0 (127.0.0.1)")


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["gloo", "sockets"])
def test_fifty_and_two_stopped(transport: str) -> None:
    assert len(kills("--trials", "50", "--transport", transport, "--seed", "1")) == 50
    assert len(kills("--trials", "2", "--transport", transport, "--stop")) == 2
