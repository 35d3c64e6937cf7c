"""Runs in ever less memory:
`python -m experiments.memory.paging MODEL... --wrap 'COMMAND {bytes}' [-o FILE.jsonl]`.

`--wrap` is a command prefix that caps the memory of what follows it, page cache included, and empties the
page cache first; for example
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
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from outsize.api import Model

PROMPT, CONTEXT, STEPS = 512, 640, 6
PART, IN_FLIGHT = 2 << 20, 4
SAMPLE, EVERY = 256 << 20, 8  # bytes read to learn the disk's rate, and after how many tokens again


def worker(model: str, memory: str, context: int, new: int) -> dict[str, object]:
    import outsize
    from outsize.forward.full import full
    from outsize.forward.span import Span
    from outsize.weights.budget import peak

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
            "model": m.name,
            "memory": m.placement.budget,
            "planned_bytes": m.placement.planned,
            "process_bytes": m.placement.process + PART * IN_FLIGHT,  # with the buffers of `Disk`
            "least_bytes": m.placement.least,
            "peak_bytes": peak(),
            "held_share": round(1 - m.placement.streamed / m.pack.size, 4),
            "bytes_per_token": (after.bytes_read - before.bytes_read) // new,
            "load_s": round(load_s, 3),
            "first_token_s": round(first_s, 4),
            "tokens_per_s": round(new / sum(steps), 4),
            "waited_s": round(after.waited_s - before.waited_s, 4),
            "disk_bytes_per_s": [round(r) for r in rates],
            **predicted(m, statistics.mean(rates)),
            "logits_sha256": digest.hexdigest(),
            "tokens": tokens[PROMPT:],
        }


class Disk:
    """How fast the disk is now, for the engine's own reader, into buffers that are there already: under
    a cap, new ones would first have to find memory."""

    def __init__(self, m: Model) -> None:
        from outsize.weights.arena import Arena
        from outsize.weights.table import Table
        from outsize.weights.traffic import Traffic

        self._loaded = m.transformer.loaded
        header = max(m.pack.tables, key=lambda t: t.size)
        self._table = Table(m.pack.path, header, Traffic(), "never")
        self._arena = Arena(IN_FLIGHT, PART)
        for i in range(IN_FLIGHT):
            self._arena[i][0].fill_(1)

    def rate(self) -> float:
        """Bytes a second, with nothing else of ours under way."""
        for cache in self._loaded.caches:
            cache.drain()
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


def predicted(m: Model, rate: float) -> dict[str, float]:
    """What `outsize plan` says for this run, with the disk as fast as it was in this sitting."""
    from outsize import planning
    from outsize.pack.outline import of_pack

    cost = planning.cost_if_known(of_pack(m.pack), m.placement, PROMPT, rate)
    assert cost is not None
    return {
        "plan_tokens_per_s": round(cost.tokens_per_s, 4),
        "plan_first_token_s": round(cost.first_token_s, 4),
        "plan_read_s": round(cost.read_s, 5),
        "plan_compute_s": round(cost.compute_s, 5),
    }


def run(wrap: str, size: int, *arguments: str) -> dict[str, object]:
    """One fresh process under a cap; what became of it."""
    prefix = shlex.split(wrap.format(bytes=size)) if wrap and size else []
    command = [*prefix, sys.executable, "-m", "experiments.memory.paging", "--worker", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    result = json.loads(last) if last.startswith("{") else {"error": done.stderr[-400:]}
    return {"cap": size, "status": done.returncode} | result


def cli(wrap: str, size: int, model: str, context: int, new: int, text: str) -> dict[str, object]:
    """The same through `outsize run`, as a user would."""
    prefix = shlex.split(wrap.format(bytes=size)) if wrap else []
    command = [*prefix, sys.executable, "-m", "outsize.cli", "run", model, text, "--raw", "--json"]
    command += [
        "-n",
        str(new),
        "-c",
        str(context),
        "--memory",
        str(size),
        "--repeat-penalty",
        "1.3",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    result = json.loads(last) if last.startswith("{") else {"error": done.stderr[-400:]}
    kills = re.findall(r"oom_kills=(\d+)", done.stderr)
    return {"cap": size, "status": done.returncode, "kills": kills} | result


def plan_of(model: str, context: int) -> dict[str, float]:
    """What `outsize plan` says; it measures computing anew, for the runs that follow."""
    command = [sys.executable, "-m", "outsize.cli", "plan", model, "--json", "-q"]
    done = subprocess.run(
        [*command, "-c", str(context)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def caps(model: str, context: int, half: bool) -> list[int]:
    """From what holds everything down to the least that works; or what holds half."""
    plan = plan_of(model, context)
    if half:
        return [int(plan["planned_bytes"] - 0.5 * plan["weights_bytes"] + 12e6)]
    low, high = int(plan["least_bytes"] * 1.01), int(plan["planned_bytes"] * 1.02)
    return [high - (high - low) * i // (STEPS - 1) for i in range(STEPS)]


def record(row: dict[str, object], output: Path | None) -> None:
    """One JSON object a line: shown, and added to a file."""
    line = json.dumps(row)
    print(line, flush=True)
    if output is not None:
        with open(output, "a") as f:
            f.write(line + "\n")


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("models", nargs="+")
    p.add_argument("--wrap", default="")
    p.add_argument("--repeats", type=int, default=1)
    p.add_argument("--caps", help="bytes, comma-separated; default: six from all to the least")
    p.add_argument("--context", type=int, default=CONTEXT)
    p.add_argument("--new", type=int, default=64)
    p.add_argument("--half", action="store_true", help="one cap: half the weights held")
    p.add_argument("--text", type=Path, help="for --cli: a text file to continue")
    p.add_argument("--characters", type=int, default=2050, help="of it: about 512 tokens")
    p.add_argument("--cli", action="store_true", help="through `outsize run`")
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--memory", default="auto")
    p.add_argument("-o", "--output", type=Path)
    a = p.parse_args()
    if a.worker:
        print(json.dumps(worker(a.models[0], a.memory, a.context, a.new)))
        return
    text = a.text.read_text()[: a.characters] if a.text else ""
    for model in a.models:
        sizes = [int(c) for c in a.caps.split(",")] if a.caps else caps(model, a.context, a.half)
        common = [model, "--context", str(a.context), "--new", str(a.new)]
        key = "text" if a.cli else "logits_sha256"
        plan_of(model, a.context)
        rows = [cli("", 1 << 40, model, a.context, a.new, text) if a.cli else run("", 0, *common)]
        for size in [None, *sizes * a.repeats]:
            if size is not None and a.cli:
                rows.append(cli(a.wrap, size, model, a.context, a.new, text))
            elif size is not None:
                plan_of(model, a.context)
                rows.append(run(a.wrap, size, *common, "--memory", str(size)))
            row = rows[-1]
            row["same"] = row.get(key) == rows[0].get(key)
            record({k: v for k, v in row.items() if k not in ("tokens", "options")}, a.output)


if __name__ == "__main__":
    main()
