"""A rank that is killed or stopped is named by the others, which end: processes over the loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def kills(*told: str) -> list[dict[str, object]]:
    command = [sys.executable, "-m", "experiments.parallel.kills", *told]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert not done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(row["good"] for row in rows), rows
    return rows


@pytest.mark.parametrize("transport", ["gloo", "sockets"])
def test_three(transport: str) -> None:
    assert len(kills("--trials", "3", "--transport", transport)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["gloo", "sockets"])
def test_fifty_and_two_stopped(transport: str) -> None:
    assert len(kills("--trials", "50", "--transport", transport, "--seed", "1")) == 50
    assert len(kills("--trials", "2", "--transport", transport, "--stop")) == 2
