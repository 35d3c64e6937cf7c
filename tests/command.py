"""The command line in this process: what a command prints and its exit status, without starting an
interpreter that imports torch. What a process is the subject of has one of its own."""

from __future__ import annotations

import io
import os
import signal
import sys
from subprocess import CompletedProcess
from unittest import mock

import torch

from outsize import log
from outsize.cli import main as cli

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if name in dir(signal)]


def outsize(*words: str, stdin: str | bytes = "", **env: str) -> CompletedProcess[str]:
    """Run `outsize` with these words, fed `stdin`, with more in its environment."""
    fed = stdin if isinstance(stdin, bytes) else stdin.encode()
    streams = [io.TextIOWrapper(io.BytesIO(data), "utf-8") for data in (fed, b"", b"")]
    before = {number: signal.getsignal(number) for number in SIGNALS}
    threads = torch.get_num_threads()
    log.warn_once.cache_clear()
    with mock.patch.multiple(
        sys, argv=["outsize", *words], stdin=streams[0], stdout=streams[1], stderr=streams[2]
    ), mock.patch.dict(os.environ, env):  # fmt: skip
        try:
            cli.main()
            status: object = 0
        except SystemExit as e:
            status = e.code
            if isinstance(status, str):
                print(status, file=sys.stderr)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            torch.set_num_threads(threads)
    out, err = (_written(stream) for stream in streams[1:])
    code = status if isinstance(status, int) else int(status is not None)
    return CompletedProcess(words, code, out, err)


def _written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode()  # type: ignore[attr-defined, no-any-return]
