"""Kills a rank at a random moment, again and again: the others must end with an error that names it.

    python -m experiments.parallel.kills [--trials 50] [--transport gloo|sockets] [--ranks 3] [--stop]

Ranks are processes that exchange messages of random sizes without end. One is killed (or, with --stop,
stopped for good, as a machine that is switched off) after up to a second. A row for each trial: which, with
which signal, how many seconds until the last of the others had ended, what each said, and whether all is as
it must be: every other rank ended with a PeerError that names the rank, exit status 1, within 11 seconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from dataclasses import replace

import torch

from experiments.runs import arguments
from outsize.errors import PeerError
from outsize.parallel.collective import Point
from outsize.parallel.exact import Exact
from outsize.parallel.gloo import Gloo
from outsize.parallel.meeting import Hello, Meeting, join
from outsize.parallel.sockets import Sockets
from outsize.parallel.transport import Transport

HERE, LIMIT_S = "127.0.0.1", 11.0
KINDS = {"gloo": Gloo, "sockets": Sockets}


def rank_of(kind: str, rank: int, world: int, meeting: Meeting, told: int) -> int:
    """One rank, in a process of its own. Writes a line to `told` once it is connected, and its error at the
    end; returns the exit status."""
    hello = replace(Hello(), world=world)
    if rank:
        meeting.close()
    mesh = (
        join(HERE, meeting.port, replace(hello, rank=rank), 20)
        if rank
        else meeting.gather(hello, 20)
    )
    try:
        transport: Transport = KINDS[kind](mesh)
        os.write(told, b"ready\n")
        exchange_for_ever(Exact(transport))
    except PeerError as error:
        os.write(told, f"{error.rank} {error}\n".encode())
        mesh.close(error)
        return error.exit_status
    return 0


def exchange_for_ever(exact: Exact) -> None:
    of_all = random.Random(5)
    while True:
        part = torch.zeros(of_all.choice([1, 1, 1, 4, 100, 600]), 896, dtype=torch.bfloat16)
        pending = [exact.sum(part, Point(0, "ffn")) for _ in range(of_all.randint(1, 3))]
        for one in pending:
            one.wait()


def trial(kind: str, world: int, stop: bool, dice: random.Random) -> dict[str, object]:
    meeting, pipes, pids = Meeting(HERE, 0), [os.pipe() for _ in range(world)], []
    for rank in range(world):
        if not (pid := os.fork()):
            status = 99
            try:
                status = rank_of(kind, rank, world, meeting, pipes[rank][1])
            finally:
                sys.stdout.flush()
                sys.exit(status)  # as a program ends: finalizers and all
        pids.append(pid)
    meeting.close()
    for _, end in pipes:
        os.close(end)
    said = [os.fdopen(start) for start, _ in pipes]
    ready = all(one.readline() == "ready\n" for one in said)
    victim, pause = dice.randrange(world), dice.random()
    time.sleep(pause)
    os.kill(pids[victim], signal.SIGSTOP if stop else signal.SIGKILL)
    start, ended = time.monotonic(), dict[int, int]()
    others = [r for r in range(world) if r != victim]
    while len(ended) < len(others) and time.monotonic() - start < 2 * LIMIT_S:
        for rank in others:
            if rank not in ended and (found := os.waitpid(pids[rank], os.WNOHANG))[0]:
                ended[rank] = os.waitstatus_to_exitcode(found[1])
        time.sleep(0.005)
    seconds = time.monotonic() - start
    for rank, pid in enumerate(pids):
        if rank not in ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    words = [one.read().strip() for one in said]
    named = all(words[r].startswith(f"{victim} rank {victim} ") for r in others)
    good = ready and named and all(ended.get(r) == 1 for r in others) and seconds < LIMIT_S
    return {
        "transport": kind, "ranks": world, "victim": victim, "signal": "STOP" if stop else "KILL",
        "after_s": round(pause, 3), "seconds": round(seconds, 3), "status": [ended.get(r) for r in others],
        "said": [words[r] for r in others], "good": good,
    }  # fmt: skip


def main() -> int:
    args = arguments(__doc__, trials=50, transport="gloo", ranks=3, stop=False, seed=0)
    dice, rows = random.Random(args.seed), []
    for _ in range(args.trials):
        rows.append(trial(args.transport, args.ranks, args.stop, dice))
        print(json.dumps(rows[-1]), flush=True)
    if args.output is not None:
        with args.output.open("a") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)
    return 0 if all(row["good"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
