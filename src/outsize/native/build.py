"""Compiles the C files here for this machine, once; without a C compiler the plain path runs.

The library is kept in the user's cache folder under a hash of source, compiler and processor. It uses
the OpenMP runtime that torch brought: a second one would fight torch's threads for the cores.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

NAMES = "rows.c", "attend.c", "groups.c", "tiles.c", "lowrank.c", "experts.c", "reads.c"
SOURCES = tuple(Path(__file__).with_name(n) for n in NAMES)
HEADER = Path(__file__).with_name("numbers.h")
FLAGS = (
    "-O3",
    "-march=native",
    "-std=gnu11",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-pthread",
)


def compiler() -> str | None:
    """The C compiler's path, if there is one."""
    return next((p for p in map(shutil.which, ("cc", "gcc", "clang")) if p), None)


def library(folder: Path) -> ctypes.CDLL | None:
    """The compiled kernels, built into `folder` if need be; None if they cannot be."""
    cc, openmp = compiler(), _openmp_runtime()
    if cc is None:
        return None
    flags = (*FLAGS, "-fopenmp" if openmp else "-fopenmp-simd")
    path = folder / f"kernels-{_key(cc, flags)}.so"
    if not path.is_file() and not _compile(cc, flags, path):
        return None
    try:
        if openmp:
            ctypes.CDLL(openmp, ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def _openmp_runtime() -> str | None:
    """The path of the GNU OpenMP runtime in this process, which importing torch loads."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return None
    lines = maps.read_text().splitlines()
    found = (line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line)
    return next(found, None)


def _key(cc: str, flags: tuple[str, ...]) -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else [platform.processor()]
    processor = sorted({line for line in lines if line.startswith(("flags", "model name"))})
    parts = (
        *(p.read_text() for p in (HEADER, *SOURCES)),
        cc,
        *flags,
        platform.machine(),
        *processor,
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(cc: str, flags: tuple[str, ...], path: Path) -> bool:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built, objects = Path(folder) / path.name, []
            for source in SOURCES:
                objects.append(str(Path(folder) / f"{source.stem}.o"))
                _call(cc, *flags, "-c", str(source), "-o", objects[-1])
            # Linked without -fopenmp: its symbols are found in the runtime already loaded.
            _call(cc, "-shared", *objects, "-o", str(built), "-lm", "-pthread")
            os.replace(built, path)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=120)
