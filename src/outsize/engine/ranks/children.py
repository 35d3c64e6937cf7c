"""Ranks that the leader starts on its own machine, and ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from outsize.parallel.secret import NAME

PATIENCE_S = 5.0  # that a rank has to end by itself


class Children:
    """Processes of `outsize join`. They end with the leader, however that ends: they see its connections
    close."""

    def __init__(self, count: int, port: int, key: str, arguments: Sequence[str]) -> None:
        """`key`: the secret that they share with the leader."""
        command = [sys.executable, "-m", "outsize", "join", f"127.0.0.1:{port}", *arguments]
        environment = {k: v for k, v in os.environ.items() if not _is_setting(k)} | {NAME: key}
        self._processes = [
            subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the leader
            )
            for _ in range(count)
        ]  # fmt: skip

    @property
    def ids(self) -> list[int]:
        """Of the processes."""
        return [process.pid for process in self._processes]

    def close(self) -> None:
        """Wait for them, or end them."""
        for process in self._processes:
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _is_setting(name: str) -> bool:
    """Of the leader's command line, as OUTSIZE_MEMORY: they are told what is theirs."""
    return name.startswith("OUTSIZE_") and name not in ("OUTSIZE_HOME", "OUTSIZE_CONFIG")
