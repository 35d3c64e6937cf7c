"""How long two ranks take to exchange a message both ways, each pinned to a core of its own.

    python -m experiments.parallel.latency [--count 3000] [-o FILE]        # sockets, gloo
    mpiexec -n 2 python -m experiments.parallel.latency --mpi NAME         # mpi4py, under its launcher

A row for each way and size: microseconds, the least, the tenth part and the median of all exchanges. On a
machine that others use the least and the tenth part are what to compare.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as torch_distributed

from experiments.runs import arguments
from outsize.kernels.find import find
from outsize.kernels.turned import turner
from outsize.parallel.collective import Point
from outsize.parallel.exact import Exact
from outsize.parallel.gloo import Gloo
from outsize.parallel.lowbit import LowBit, Turned
from outsize.parallel.meeting import Hello, Meeting, join
from outsize.parallel.sockets import Sockets
from outsize.parallel.transport import Transport

SIZES = [462, 1792, 3584, 8192, 14336, 65536, 917504]
HERE = "127.0.0.1"
Exchange = Callable[[], None]


def timed(exchange: Exchange, count: int) -> dict[str, object]:
    for _ in range(max(20, count // 10)):
        exchange()
    spans = []
    for _ in range(count):
        start = time.perf_counter()
        exchange()
        spans.append(time.perf_counter() - start)
    spans.sort()
    of = {"least_us": 0, "p10_us": count // 10, "median_us": count // 2}
    return {"count": count, **{name: round(spans[at] * 1e6, 1) for name, at in of.items()}}


def through(transport: Transport, size: int) -> Exchange:
    other, into = 1 - transport.rank, bytearray(size)
    out = bytearray(size)
    return lambda: transport.exchange(out, {other: into})


def all_reduce(group: torch_distributed.ProcessGroup, size: int) -> Exchange:
    """What torch's own sum takes, of fp32 numbers in as many bytes."""
    x = torch.zeros(size // 4, dtype=torch.float32)
    options = torch_distributed.AllreduceOptions()
    return lambda: group.allreduce([x], options).wait()


def rank_of(rank: int, port: int, count: int, output: Path | None) -> None:
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    hello, rows = Hello(world=2), []
    for way in ("sockets", "sockets, with a secret", "gloo, point to point", "gloo, all_reduce"):
        os.environ["OUTSIZE_SECRET"] = "0123456789abcdef" * way.endswith("secret")
        mesh = join(HERE, port, hello, 20) if rank else Meeting(HERE, port).gather(hello, 20)
        transport: Transport = Sockets(mesh) if way.startswith("sockets") else Gloo(mesh)
        for size in SIZES:
            some = count if size < 1 << 17 else max(count // 20, 20)
            reduces = way == "gloo, all_reduce"
            exchange = all_reduce(transport.group, size) if reduces else through(transport, size)
            rows.append({"way": way, "bytes": size, **timed(exchange, some)})
            if way == "sockets" and size < 1 << 17:
                rows += [sums(transport, size, bits, some) for bits in (16, 4)]
        mesh.close()
    if rank == 0:
        keep(rows, output)


def sums(transport: Transport, size: int, bits: int, count: int) -> dict[str, object]:
    """A whole sum of one row of bf16 numbers in so many bytes, torch and all."""
    part, at = torch.zeros(1, max(size // 256, 1) * 128, dtype=torch.bfloat16), Point(0, "ffn")
    exact = Exact(transport)
    codec = Turned(turner(bits, find())) if bits < 16 else None
    low = LowBit(exact, lambda _: codec)
    row = timed(lambda: low.sum(part, at).wait(), count)
    return {"way": f"sockets, a sum in {bits} bits", "bytes": part.nbytes, **row}


def keep(rows: list[dict[str, object]], output: Path | None) -> None:
    busy = round(os.getloadavg()[0], 1)  # how many wanted a core
    lines = [json.dumps({**row, "busy": busy}) for row in rows]
    print("\n".join(lines))
    if output is not None:
        with output.open("a") as out:
            out.writelines(line + "\n" for line in lines)


def through_mpi(name: str, count: int, output: Path | None) -> None:
    from mpi4py import MPI

    comm, rows = MPI.COMM_WORLD, []
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[comm.rank]})
    for size in SIZES:
        out, into, other = bytearray(size), bytearray(size), 1 - comm.rank

        def exchange(out: bytearray = out, into: bytearray = into, other: int = other) -> None:
            comm.Sendrecv(out, other, recvbuf=into, source=other)

        some = count if size < 1 << 17 else max(count // 20, 20)
        rows.append({"way": f"mpi4py, {name}", "bytes": size, **timed(exchange, some)})
    if comm.rank == 0:
        keep(rows, output)


def main() -> int:
    args = arguments(__doc__, count=3000, mpi="")
    if args.mpi:
        through_mpi(args.mpi, args.count, args.output)
        return 0
    meeting = Meeting(HERE, 0)
    meeting.close()
    if not (pid := os.fork()):
        rank_of(1, meeting.port, args.count, None)
        os._exit(0)
    rank_of(0, meeting.port, args.count, args.output)
    os.waitpid(pid, 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
