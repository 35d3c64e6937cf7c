"""A rank that fails without closing anything while a long exchange is under way: `python -m
tests.parallel.leaves RANK PORT TRANSPORT`."""

from __future__ import annotations

import sys
import time

import torch

from outsize.parallel.collective import Point
from outsize.parallel.connect import transport
from outsize.parallel.exact import Exact
from outsize.parallel.meeting import Hello, Meeting, join


def main() -> None:
    rank, port = int(sys.argv[1]), int(sys.argv[2])
    hello = Hello(world=2)
    mesh = (
        join("127.0.0.1", port, hello, 60) if rank else Meeting("127.0.0.1", port).gather(hello, 60)
    )
    exact = Exact(transport(mesh, sys.argv[3]))
    part = torch.zeros(2000, 896, dtype=torch.bfloat16)
    exact.sum(part, Point(0, "ffn")).wait()
    while rank:  # the second does not take part, and looks whether the first lives
        time.sleep(0.05)
        mesh.watch.check()
    exact.sum(part, Point(1, "ffn"))
    raise ValueError("not for the wire")


if __name__ == "__main__":
    main()
