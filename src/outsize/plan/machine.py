"""This machine, measured once and kept: what the cost model predicts with."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from outsize import __version__
from outsize.plan import probe
from outsize.weights.reader import THREADS
from outsize.weights.tickets import PIECE

FILE = "machine.json"
SIZES = (128 << 10, 512 << 10, 1 << 20, 4 << 20)
COUNTS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Compute:
    """Seconds that one layer, or the head, of each table takes: by table name, for one token and for a
    chunk of a long prompt. Measured on random weights of exactly those shapes."""

    step_s: dict[str, float]
    chunk_s: dict[str, float]
    chunk_tokens: int


@dataclass(frozen=True, slots=True)
class Machine:
    """`disk`: (bytes a read, threads, bytes a second) of direct reads. `models`: by shape."""

    measured_at: float  # seconds since 1970
    processor: str
    threads: int
    memory_bytes_per_s: float
    bf16_flops: float
    fp32_flops: float
    disk: list[tuple[int, int, float]]
    models: dict[str, Compute]
    version: str = __version__

    @property
    def disk_bytes_per_s(self) -> float:
        """Of the reads that the engine makes."""
        found = [rate for size, threads, rate in self.disk if (size, threads) == (PIECE, THREADS)]
        return found[0]

    def at_rate(self, bytes_per_s: float) -> Machine:
        """The same machine with its disk as fast as it is now."""
        return replace(self, disk=[(PIECE, THREADS, bytes_per_s)])

    @property
    def age_s(self) -> float:
        return max(0.0, time.time() - self.measured_at)


def measure(home: Path) -> Machine:
    """Some seconds."""
    return Machine(
        measured_at=time.time(),
        processor=probe.processor(),
        threads=torch.get_num_threads(),
        memory_bytes_per_s=round(probe.memory_bandwidth()),
        bf16_flops=round(probe.matmul_speed()),
        fp32_flops=round(probe.matmul_speed(torch.float32)),
        disk=_disk(home),
        models={},
    )


def _disk(home: Path) -> list[tuple[int, int, float]]:
    """Of the home's disk; of the temporary folder's where the home cannot be written."""
    try:
        return probe.disk_curve(home, SIZES, COUNTS)
    except OSError:
        return probe.disk_curve(Path(tempfile.gettempdir()), SIZES, COUNTS)


def kept(home: Path) -> Machine | None:
    """What was measured before, if it was here and by this version."""
    try:
        raw = json.loads((home / FILE).read_text(encoding="utf-8"))
        raw["disk"] = [(int(s), int(t), float(r)) for s, t, r in raw["disk"]]
        raw["models"] = {k: Compute(**v) for k, v in raw["models"].items()}
        found = Machine(**raw)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    same = found.processor == probe.processor() and found.version == __version__
    return found if same and found.threads == torch.get_num_threads() else None


def keep(machine: Machine, home: Path) -> None:
    """Where the home can be written."""
    with suppress(OSError):
        home.mkdir(parents=True, exist_ok=True)
        temporary = home / f".{FILE}.{os.getpid()}"
        temporary.write_text(json.dumps(asdict(machine)), encoding="utf-8")
        os.replace(temporary, home / FILE)


def known(home: Path, say: Callable[[str], None]) -> Machine:
    """What is kept, else measured now, and kept."""
    found = kept(home)
    if found is None:
        say("measuring this machine, once (again with `outsize doctor`)")
        found = measure(home)
        keep(found, home)
    return found


def with_model(machine: Machine, key: str, compute: Compute, home: Path) -> Machine:
    """The machine with one more model's times, kept."""
    made = replace(machine, models=machine.models | {key: compute})
    keep(made, home)
    return made
