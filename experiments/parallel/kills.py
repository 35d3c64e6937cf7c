"""Kills a rank at a random moment, again and again: the others must end with an error that names it.

    python -m experiments.parallel.kills [--trials 50] [--transport gloo|sockets] [--ranks 3] [--stop]

Ranks are processes that exchange messages of random sizes without end. One is killed (or, with --stop,
stopped for good, as a machine that is switched off) after up to a second. A row for each trial: which, with
which signal, how many seconds until all others had an error and until their processes had ended, what each
said, and whether all is as it must be: a PeerError that names the rank within 11 seconds, exit status 1.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace

import torch

from experiments.runs import arguments, record
from outsize.errors import PeerError
from outsize.parallel.collective import Point
from outsize.parallel.exact import Exact
from outsize.parallel.gloo import Gloo
from outsize.parallel.meeting import Hello, Meeting, join
from outsize.parallel.sockets import Sockets
from outsize.parallel.transport import Transport

HERE = "127.0.0.1"
NAMED_S, ENDED_S = 11.0, 40.0  # a busy machine takes its time to end a process
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
        os.write(told, f"{time.monotonic()} {error.rank} {error}\n".encode())
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
    try:
        ready = all(one.readline() == "ready\n" for one in said)
        victim, pause = dice.randrange(world), dice.random()
        time.sleep(pause)
        os.kill(pids[victim], signal.SIGSTOP if stop else signal.SIGKILL)
        start, others = time.monotonic(), [r for r in range(world) if r != victim]
        ended = wait_for({r: pids[r] for r in others})
        seconds = time.monotonic() - start
    finally:
        end_all(pids)
    words = [(one.read().strip() or "inf no word").split(" ", 1) for one in said]
    named_s = max(float(words[r][0]) for r in others) - start
    named = all(words[r][1].startswith(f"{victim} rank {victim} ") for r in others)
    good = ready and named and named_s < NAMED_S and all(ended.get(r) == 1 for r in others)
    return {
        "transport": kind, "ranks": world, "victim": victim, "signal": "STOP" if stop else "KILL",
        "after_s": round(pause, 3), "named_s": round(named_s, 3), "ended_s": round(seconds, 3),
        "status": [ended.get(r) for r in others], "said": [words[r][1] for r in others], "good": good,
    }  # fmt: skip


def wait_for(pids: dict[int, int]) -> dict[int, int]:
    """Exit status by rank, of those that ended in time."""
    start, ended = time.monotonic(), dict[int, int]()
    while len(ended) < len(pids) and time.monotonic() - start < ENDED_S:
        for rank, pid in pids.items():
            if rank not in ended and (found := os.waitpid(pid, os.WNOHANG))[0]:
                ended[rank] = os.waitstatus_to_exitcode(found[1])
        time.sleep(0.002)
    return ended


def end_all(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def main() -> int:
    args = arguments(__doc__, trials=50, transport="gloo", ranks=3, stop=False, seed=0)
    dice, rows = random.Random(args.seed), []
    for _ in range(args.trials):
        rows.append(trial(args.transport, args.ranks, args.stop, dice))
        record(rows[-1], args.output)
    return 0 if all(row["good"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
