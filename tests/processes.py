"""Several processes that train together, as torchrun starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

LIMIT_S = 120


def together(*words: str, world: int = 2, **env: str) -> list[tuple[str, str]]:
    """Run `outsize` with these words in so many processes, with more in their environment: what each printed,
    and what it said on stderr. All must end well; skips where there is no loopback."""
    met = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(world)}
    given = os.environ | met | {"OMP_NUM_THREADS": "1"} | env
    command = [sys.executable, "-m", "outsize.cli.main", *words]
    ranks = [
        subprocess.Popen(command, env=given | {"RANK": str(r), "LOCAL_RANK": str(r)},
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for r in range(world)
    ]  # fmt: skip
    said = [process.communicate(timeout=LIMIT_S) for process in ranks]
    assert [process.returncode for process in ranks] == [0] * world, said
    return said


def _free_port() -> int:
    try:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            return int(s.getsockname()[1])
    except OSError as e:
        pytest.skip(f"no loopback here: {e}")
