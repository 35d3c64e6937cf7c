"""The speed of this machine, measured and kept in a file of the home folder: what the cost model predicts
with."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
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
MOST = 5  # measurements that are kept


@dataclass(frozen=True, slots=True)
class Compute:
    """Seconds that computing one record (a layer, an expert, the head) of each table takes, by the table's
    name: for one token behind a chunk of a prompt, and for such a chunk. `entry_s`: what each further token
    before it adds to the first. Measured on random weights of exactly those shapes."""

    step_s: dict[str, float]
    chunk_s: dict[str, float]
    chunk_tokens: int
    entry_s: dict[str, float] = field(default_factory=dict)

    def or_faster(self, other: Compute) -> Compute:
        """The lower time of each; `other` where they are of different tables."""
        if self.chunk_tokens != other.chunk_tokens or self.step_s.keys() != other.step_s.keys():
            return other
        steps = {k: min(v, other.step_s[k]) for k, v in self.step_s.items()}
        chunks = {k: min(v, other.chunk_s[k]) for k, v in self.chunk_s.items()}
        entries = {k: min(v, other.entry_s.get(k, v)) for k, v in self.entry_s.items()}
        return replace(self, step_s=steps, chunk_s=chunks, entry_s=entries)

    def at_most(self, expected_s: float, took_s: float) -> Compute:
        """All times of a token scaled down, where a step took less than was expected."""
        if took_s >= NOTABLE * expected_s:
            return self
        return replace(self, step_s={k: v * took_s / expected_s for k, v in self.step_s.items()})


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measurement. `busy`: why it may be too low. `disk`: (bytes a read, threads, bytes a second) of
    direct reads."""

    measured_at: float  # seconds since 1970
    busy: str
    memory_bytes_per_s: float
    bf16_flops: float
    fp32_flops: float
    disk: list[tuple[int, int, float]]


@dataclass(frozen=True, slots=True)
class Machine:
    """All that was measured here. A figure is the best of the last measurements: whatever else runs can
    make one slower, and none faster. `name`: of the processor. `models`: times by shape of a model."""

    name: str
    measurements: tuple[Measurement, ...]
    models: dict[str, Compute]
    version: str = __version__
    rate_now: float = 0.0  # bytes a second of the disk, in place of what was measured; 0: none

    @property
    def measured_at(self) -> float:
        return max(s.measured_at for s in self.measurements)

    @property
    def busy(self) -> str:
        """Why the last measurement may be too low; empty: it is not."""
        return self.measurements[-1].busy

    @property
    def memory_bytes_per_s(self) -> float:
        return max(s.memory_bytes_per_s for s in self.measurements)

    @property
    def bf16_flops(self) -> float:
        return max(s.bf16_flops for s in self.measurements)

    @property
    def fp32_flops(self) -> float:
        return max(s.fp32_flops for s in self.measurements)

    @property
    def disk(self) -> list[tuple[int, int, float]]:
        """The best rate of each size and number of threads."""
        best: dict[tuple[int, int], float] = {}
        for size, threads, rate in (cell for s in self.measurements for cell in s.disk):
            best[size, threads] = max(rate, best.get((size, threads), 0.0))
        return [(size, threads, rate) for (size, threads), rate in best.items()]

    @property
    def disk_bytes_per_s(self) -> float:
        """Of reads as the engine makes them."""
        found = [rate for size, threads, rate in self.disk if (size, threads) == (PIECE, THREADS)]
        return self.rate_now or found[0]

    def at_rate(self, bytes_per_s: float) -> Machine:
        """The same machine with its disk as fast as it is now."""
        return replace(self, rate_now=bytes_per_s)

    def achieved(self, disk_bytes_per_s: float, memory_bytes_per_s: float) -> Machine:
        """With what a run has reached, where that is more than was ever measured."""
        last = self.measurements[-1]
        if disk_bytes_per_s > self.disk_bytes_per_s:
            others = [cell for cell in last.disk if cell[:2] != (PIECE, THREADS)]
            last = replace(last, disk=[*others, (PIECE, THREADS, disk_bytes_per_s)])
        if memory_bytes_per_s > self.memory_bytes_per_s:
            last = replace(last, memory_bytes_per_s=memory_bytes_per_s)
        return replace(self, measurements=(*self.measurements[:-1], last))

    @property
    def age_s(self) -> float:
        return max(0.0, time.time() - self.measured_at)


def name() -> str:
    """What names this machine: where it differs, nothing that was measured counts."""
    return f"{probe.processor()}, {probe.cores()} cores, {torch.get_num_threads()} threads"


def measure(home: Path) -> Measurement:
    """Measure memory, processor and the disk of `home`: some seconds."""
    with Watch() as watch:
        memory = probe.memory_bandwidth(watch)
        bf16, fp32 = (probe.matmul_speed(t, watch) for t in (torch.bfloat16, torch.float32))
        disk = _disk(home)
    return Measurement(time.time(), watch.reason, round(memory), round(bf16), round(fp32), disk)


def measured(home: Path) -> Machine:
    """Measure once more, and keep it."""
    found, now = kept(home), measure(home)
    before = () if found is None else found.measurements
    models = {} if found is None else found.models
    made = Machine(name(), (*before, now)[-MOST:], models)
    keep(made, home)
    return made


def _all(home: Path) -> dict[str, object]:
    """The file's entries: of all machines that share a home."""
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
    """What is kept of this machine by this version; None: nothing, or the file is damaged."""
    try:
        raw: Any = _all(home)[name()]
        measurements = [
            Measurement(**(s | {"disk": [_cell(*c) for c in s["disk"]]}))
            for s in raw["measurements"]
        ]
        models = {k: Compute(**v) for k, v in raw["models"].items()}
        found = Machine(name(), tuple(measurements), models, raw["version"])
        good = found.disk_bytes_per_s > 0 and found.memory_bytes_per_s > 0
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        return None
    return found if good and found.version == __version__ else None


def _cell(size: int, threads: int, rate: float) -> tuple[int, int, float]:
    return int(size), int(threads), float(rate)


def keep(machine: Machine, home: Path) -> None:
    """Write the file, where the home can be written."""
    machines = _all(home) | {machine.name: asdict(replace(machine, rate_now=0.0))}
    with suppress(OSError):
        home.mkdir(parents=True, exist_ok=True)
        temporary = home / f".{FILE}.{os.getpid()}"
        temporary.write_text(json.dumps({"machines": machines}), encoding="utf-8")
        os.replace(temporary, home / FILE)


def known(home: Path, say: Callable[[str], None]) -> Machine:
    """What is kept; else measure, and keep that."""
    found = kept(home)
    if found is None:
        say("measuring this machine, once (again with `outsize doctor`)")
        found = measured(home)
    return found


def with_model(machine: Machine, key: str, compute: Compute, home: Path) -> Machine:
    """Keep the times of one more model."""
    made = replace(machine, models=machine.models | {key: compute})
    keep(made, home)
    return made
