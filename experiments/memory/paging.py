"""Runs in ever less memory:
`python -m experiments.memory.paging MODEL... --wrap 'COMMAND {bytes}' [-o FILE.jsonl]`.

`--wrap` caps the memory of what follows it, page cache included, and empties the page cache first:
    systemd-run --scope -q -p MemoryMax={bytes} -p MemorySwapMax=0
`outsize plan` runs before each. Every run is a fresh process: it prefills 512 tokens and decodes, hashes
all logits, and states what was planned, what was measured, and how fast the disk gave the same kind of reads
right before and after.
One JSON object a line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from pathlib import Path

import psutil

import outsize
from experiments.runs import HIDDEN, OUTSIZE, WRAP, Row, arguments, fresh, good, record
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.pack.outline import of_pack
from outsize.plan import make as planning
from outsize.storage.buffers import BufferPool
from outsize.storage.stats import IOStats
from outsize.storage.table import Table
from outsize.system.memory import peak

PROMPT, CONTEXT, STEPS = 512, 640, 6
PART, IN_FLIGHT = 2 << 20, 4
SAMPLE, EVERY = 256 << 20, 8  # bytes read to learn the disk's rate, and after how many tokens again


def worker(model: str, memory: str, context: int, new: int) -> Row:
    started = time.perf_counter()
    with outsize.load(model, memory=memory, context=context, quiet=True, draft="none") as m:
        load_s = time.perf_counter() - started
        disk = Disk(m)
        vocab = m.pack.description.vocab_size
        tokens = [(i * i * 7919 + 13 * i + 5) % (vocab - 300) for i in range(PROMPT)]
        kv, digest, steps = m.transformer.new_kv(context), hashlib.sha256(), []
        rates = [disk.rate()]
        begun = time.perf_counter()
        (out,) = full(m.transformer, [Span(0, tokens)], [kv])
        first_s = time.perf_counter() - begun
        rates.append(disk.rate())
        before = m.traffic
        for i in range(new):
            digest.update(out.logits_KV.numpy().tobytes())
            tokens.append(int(out.logits_KV[-1].argmax()))
            begun = time.perf_counter()
            (out,) = full(m.transformer, [Span(PROMPT + i, tokens[-1:])], [kv])
            steps.append(time.perf_counter() - begun)
            if m.placement.streamed and i % EVERY == EVERY - 1:
                rates.append(disk.rate())
        after = m.traffic
        return {
            "model": m.name, "memory": m.placement.budget, "planned_bytes": m.placement.planned,
            "process_bytes": m.placement.process + PART * IN_FLIGHT,  # with the buffers of `Disk`
            "least_bytes": m.placement.least, "peak_bytes": peak(),
            "held_share": round(1 - m.placement.streamed / m.pack.size, 4),
            "bytes_per_token": (after.bytes_read - before.bytes_read) // new,
            "load_s": round(load_s, 3), "first_token_s": round(first_s, 4),
            "tokens_per_s": round(new / sum(steps), 4),
            "waited_s": round(after.waited_s - before.waited_s, 4),
            "disk_bytes_per_s": [round(r) for r in rates], **predicted(m, statistics.mean(rates)),
            "logits_sha256": digest.hexdigest(), "tokens": tokens[PROMPT:],
        }  # fmt: skip


def settled() -> None:
    """Wait until this process reads nothing more."""
    before, now = -1, 0
    while before != now:
        time.sleep(0.1)
        before, now = now, psutil.Process().io_counters().read_bytes


class Disk:
    """How fast the disk is now, for the engine's own reader, into buffers that are there already: under
    a cap, new ones would first have to find memory."""

    def __init__(self, m: outsize.Model) -> None:
        self._loaded = m.transformer.loaded
        header = max(m.pack.tables, key=lambda t: t.size)
        self._table = Table(m.pack.path, header, IOStats(), "never")
        self._arena = BufferPool(IN_FLIGHT, PART)
        for i in range(IN_FLIGHT):
            self._arena[i][0].fill_(1)

    def rate(self) -> float:
        """Bytes a second, with nothing else of ours under way."""
        settled()
        starts, tickets = range(0, self._table.header.size - PART, PART), []
        begun = time.perf_counter()
        for n in range(SAMPLE // PART):
            if n >= IN_FLIGHT:
                tickets[n - IN_FLIGHT].wait()
            out = self._arena[n % IN_FLIGHT][1]
            at = starts[n * 7 % len(starts)]
            tickets.append(self._loaded.reader.submit(self._table, 0, out, at))
        for ticket in tickets:
            ticket.wait()
        return len(tickets) * PART / (time.perf_counter() - begun)


def predicted(m: outsize.Model, rate: float) -> Row:
    """What `outsize plan` says for this run, with the disk as fast as it was in this sitting."""
    cost = planning.cost_if_known(of_pack(m.pack), m.placement, PROMPT, rate)
    assert cost is not None
    return {
        "plan_tokens_per_s": round(cost.tokens_per_s, 4), "plan_read_s": round(cost.read_s, 5),
        "plan_first_token_s": round(cost.first_token_s, 4), "plan_compute_s": round(cost.compute_s, 5),
    }  # fmt: skip


def run(wrap: str, cap: int, *arguments: str) -> Row:
    return fresh("-m", "experiments.memory.paging", "--worker", *arguments, wrap=wrap, cap=cap)


def cli(a: argparse.Namespace, wrap: str, cap: int, model: str) -> Row:
    """The same through `outsize run`, as a user would."""
    text = Path(a.text).read_text()[: a.characters]
    told = ["-n", str(a.new), "-c", str(a.context), "--memory", str(cap), "--repeat-penalty", "1.3"]
    return fresh(*OUTSIZE, "run", model, text, "--raw", "--json", *told, wrap=wrap, cap=cap)


def plan_of(model: str, context: int) -> Row:
    """What `outsize plan` says; it measures computing anew, for the runs that follow."""
    return good(fresh(*OUTSIZE, "plan", model, "--json", "-q", "-c", str(context)))


def caps(model: str, context: int, half: bool) -> list[int]:
    """From what holds everything down to the least that works; or what holds half."""
    plan = plan_of(model, context)
    if half:
        return [int(plan["planned_bytes"] - 0.5 * plan["weights_bytes"] + 12e6)]
    low, high = int(plan["least_bytes"] * 1.01), int(plan["planned_bytes"] * 1.02)
    return [high - (high - low) * i // (STEPS - 1) for i in range(STEPS)]


def main() -> None:
    a = arguments(
        __doc__, "models+", wrap=WRAP, repeats=1, context=CONTEXT, new=64, memory="auto", worker=HIDDEN,
        caps=("", "bytes, comma-separated; else six from all to the least"),
        half=(False, "one cap: half the weights held"), cli=(False, "through `outsize run`"),
        text=("", "for --cli: a file to continue"), characters=(2050, "of it: about 512 tokens"),
    )  # fmt: skip
    if a.worker:
        print(json.dumps(worker(a.models[0], a.memory, a.context, a.new)))
        return
    for model in a.models:
        sizes = [int(c) for c in a.caps.split(",")] if a.caps else caps(model, a.context, a.half)
        common = [model, "--context", str(a.context), "--new", str(a.new)]
        key, first = "text" if a.cli else "logits_sha256", None
        for size in [None, *sizes * a.repeats]:
            plan_of(model, a.context)
            if a.cli:
                row = cli(a, a.wrap if size else "", size or 1 << 40, model)
            else:
                row = run(a.wrap, size or 0, *common, "--memory", str(size or "auto"))
            first = first or row
            row["same"] = row.get(key) == first.get(key)
            record({k: v for k, v in row.items() if k not in ("tokens", "options")}, a.output)


if __name__ == "__main__":
    main()
