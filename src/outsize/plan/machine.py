"""This machine, measured and kept: what the cost model predicts with."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from outsize.plan import probe
from outsize.plan.cores import Watch
from outsize.storage.reader import THREADS
from outsize.storage.tickets import PIECE
from outsize.version import __version__

FILE = "machine.json"
SIZES = (128 << 10, 512 << 10, 1 << 20, 4 << 20)
COUNTS = (1, 2, 4, 8)
NOTABLE = 0.95  # of a time: what is faster is news
SITTINGS = 5  # that are kept


@dataclass(frozen=True, slots=True)
class Compute:
    """Seconds that one layer, or the head, of each table takes: by table name, for one token and for a
    chunk of a long prompt. Measured on random weights of exactly those shapes."""

    step_s: dict[str, float]
    chunk_s: dict[str, float]
    chunk_tokens: int

    def or_faster(self, other: Compute) -> Compute:
        """The better time of each."""
        if self.chunk_tokens != other.chunk_tokens or self.step_s.keys() != other.step_s.keys():
            return other
        steps = {k: min(v, other.step_s[k]) for k, v in self.step_s.items()}
        chunks = {k: min(v, other.chunk_s[k]) for k, v in self.chunk_s.items()}
        return replace(self, step_s=steps, chunk_s=chunks)

    def at_most(self, told_s: float, took_s: float) -> Compute:
        """A step that should take `told_s` took less."""
        if took_s >= NOTABLE * told_s:
            return self
        return replace(self, step_s={k: v * took_s / told_s for k, v in self.step_s.items()})


@dataclass(frozen=True, slots=True)
class Sitting:
    """What was measured at one time. `busy`: why it may be too low. `disk`: (bytes a read, threads, bytes a
    second) of direct reads."""

    measured_at: float  # seconds since 1970
    busy: str
    memory_bytes_per_s: float
    bf16_flops: float
    fp32_flops: float
    disk: list[tuple[int, int, float]]


@dataclass(frozen=True, slots=True)
class Machine:
    """A kind of processor, as `name` tells it. Its figures are the best of the last sittings: whatever else
    runs can make a measurement slower, and none faster. `models`: by shape."""

    name: str
    sittings: tuple[Sitting, ...]
    models: dict[str, Compute]
    version: str = __version__
    rate_now: float = 0.0  # of the disk, if it is to be another

    @property
    def measured_at(self) -> float:
        return max(s.measured_at for s in self.sittings)

    @property
    def busy(self) -> str:
        """Why the last sitting may be too low."""
        return self.sittings[-1].busy

    @property
    def memory_bytes_per_s(self) -> float:
        return max(s.memory_bytes_per_s for s in self.sittings)

    @property
    def bf16_flops(self) -> float:
        return max(s.bf16_flops for s in self.sittings)

    @property
    def fp32_flops(self) -> float:
        return max(s.fp32_flops for s in self.sittings)

    @property
    def disk(self) -> list[tuple[int, int, float]]:
        """The best rate of each size and number of threads."""
        best: dict[tuple[int, int], float] = {}
        for size, threads, rate in (cell for s in self.sittings for cell in s.disk):
            best[size, threads] = max(rate, best.get((size, threads), 0.0))
        return [(size, threads, rate) for (size, threads), rate in best.items()]

    @property
    def disk_bytes_per_s(self) -> float:
        """Of the reads that the engine makes."""
        found = [rate for size, threads, rate in self.disk if (size, threads) == (PIECE, THREADS)]
        return self.rate_now or found[0]

    def at_rate(self, bytes_per_s: float) -> Machine:
        """The same machine with its disk as fast as it is now."""
        return replace(self, rate_now=bytes_per_s)

    def achieved(self, disk_bytes_per_s: float, memory_bytes_per_s: float) -> Machine:
        """With what a run has reached, where that is more than was ever measured."""
        last = self.sittings[-1]
        if disk_bytes_per_s > self.disk_bytes_per_s:
            others = [cell for cell in last.disk if cell[:2] != (PIECE, THREADS)]
            last = replace(last, disk=[*others, (PIECE, THREADS, disk_bytes_per_s)])
        if memory_bytes_per_s > self.memory_bytes_per_s:
            last = replace(last, memory_bytes_per_s=memory_bytes_per_s)
        return replace(self, sittings=(*self.sittings[:-1], last))

    @property
    def age_s(self) -> float:
        return max(0.0, time.time() - self.measured_at)


def name() -> str:
    """Of this machine: where it differs, nothing that was measured counts."""
    return f"{probe.processor()}, {probe.cores()} cores, {torch.get_num_threads()} threads"


def measure(home: Path) -> Sitting:
    """Some seconds."""
    with Watch() as watch:
        memory = probe.memory_bandwidth(watch)
        bf16, fp32 = (probe.matmul_speed(t, watch) for t in (torch.bfloat16, torch.float32))
        disk = _disk(home)
    return Sitting(time.time(), watch.reason, round(memory), round(bf16), round(fp32), disk)


def measured(home: Path) -> Machine:
    """This machine after one more sitting, kept."""
    found, now = kept(home), measure(home)
    before = () if found is None else found.sittings
    models = {} if found is None else found.models
    made = Machine(name(), (*before, now)[-SITTINGS:], models)
    keep(made, home)
    return made


def _all(home: Path) -> dict[str, object]:
    """What is kept of all machines that share a home."""
    try:
        raw = json.loads((home / FILE).read_text(encoding="utf-8"))
        found = raw["machines"]
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return found if isinstance(found, dict) else {}


def _disk(home: Path) -> list[tuple[int, int, float]]:
    """Of the home's disk; of the temporary folder's where the home cannot be written."""
    try:
        return probe.disk_curve(home, SIZES, COUNTS)
    except OSError:
        return probe.disk_curve(Path(tempfile.gettempdir()), SIZES, COUNTS)


def kept(home: Path) -> Machine | None:
    """What was measured before, if it was here and by this version."""
    try:
        raw: Any = _all(home)[name()]
        sittings = [
            Sitting(**(s | {"disk": [_cell(*c) for c in s["disk"]]})) for s in raw["sittings"]
        ]
        models = {k: Compute(**v) for k, v in raw["models"].items()}
        found = Machine(name(), tuple(sittings), models, raw["version"])
        good = found.disk_bytes_per_s > 0 and found.memory_bytes_per_s > 0
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        return None
    return found if good and found.version == __version__ else None


def _cell(size: int, threads: int, rate: float) -> tuple[int, int, float]:
    return int(size), int(threads), float(rate)


def keep(machine: Machine, home: Path) -> None:
    """Where the home can be written."""
    machines = _all(home) | {machine.name: asdict(replace(machine, rate_now=0.0))}
    with suppress(OSError):
        home.mkdir(parents=True, exist_ok=True)
        temporary = home / f".{FILE}.{os.getpid()}"
        temporary.write_text(json.dumps({"machines": machines}), encoding="utf-8")
        os.replace(temporary, home / FILE)


def known(home: Path, say: Callable[[str], None]) -> Machine:
    """What is kept, else measured now, and kept."""
    found = kept(home)
    if found is None:
        say("measuring this machine, once (again with `outsize doctor`)")
        found = measured(home)
    return found


def with_model(machine: Machine, key: str, compute: Compute, home: Path) -> Machine:
    """The machine with one more model's times, kept."""
    made = replace(machine, models=machine.models | {key: compute})
    keep(made, home)
    return made
