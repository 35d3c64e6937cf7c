"""Compiles the C files here for this machine, once; without a C compiler the plain path runs.

The library is kept in the user's cache folder under a hash of source and processor, beside a hash of itself.
It is code: it is run only where nobody but this user (or root) could have put it, and only as it was built.
Where the folder cannot be written, or is not ours alone, a process builds its own in a folder of its own.
It uses the OpenMP runtime that torch brought: a second one would fight torch's threads for the cores.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

NAMES = (
    "palettes.c", "groups.c", "attend.c", "tiles.c", "rows.c", "lowrank.c", "experts.c", "delta.c", "reads.c",
    "spans.c", "wire.c", "heads.c", "chunks.c",
)  # fmt: skip
SOURCES = tuple(Path(__file__).with_name("csrc") / n for n in NAMES)
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
LIMIT_S = 300  # of a file, on a machine that is busy
# What says in /proc/cpuinfo which instructions there are; on ARM, the last three.
PROCESSOR = ("flags", "model name", "Features", "CPU implementer", "CPU part")
NO_COMPILER = "no C compiler was found"
HEADER = Path(__file__).with_name("csrc") / "numbers.h"
# On ARM `mcpu` says what `march` does elsewhere; Apple's clang has no other before version 15.
OWN_PROCESSOR = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
FLAGS = (
    "-O3",
    OWN_PROCESSOR,
    "-std=gnu11",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-pthread",
)


def compiler() -> str | None:
    """The C compiler's path, if there is one."""
    return next((p for p in map(shutil.which, ("cc", "gcc", "clang")) if p), None)


class Built(NamedTuple):
    """The kernels; `note`: why there are none, or why they are this process's alone, in a sentence."""

    library: ctypes.CDLL | None
    note: str = ""


def built(folder: Path) -> Built:
    """The compiled kernels, built into `folder` if need be."""
    openmp = _openmp_runtime()
    flags = (*FLAGS, "-fopenmp" if openmp else "-fopenmp-simd")
    try:
        path, cc = folder / f"kernels-{_key(flags)}.so", compiler()
    except OSError as e:
        return _none(f"{e.filename}: {e.strerror}", "install outsize again, into a folder")
    why = _not_ours(folder)
    if not why:
        if _is_as_built(path):
            return _loaded(path, openmp)
        if cc is None:
            return _none(NO_COMPILER)
        why = _kept(cc, flags, path)
        if not why:
            return _loaded(path, openmp)
    return _none(NO_COMPILER) if cc is None else _own(cc, flags, openmp, f"{folder}: {why}")


def _none(why: str, cure: str = "install gcc or clang") -> Built:
    return Built(None, f"there are no compiled kernels ({why}): runs are many times slower; {cure}")


def _loaded(path: Path, openmp: str | None) -> Built:
    try:
        if openmp:
            ctypes.CDLL(openmp, ctypes.RTLD_GLOBAL)
        return Built(_open(path))
    except OSError as e:
        return _none(f"the system refuses to load them: {e}")


def _open(path: Path) -> ctypes.CDLL:
    """From memory where the file's disk allows no programs (noexec). Raises OSError."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        if sys.platform != "linux":
            raise
        handle = os.memfd_create(path.name)
        with open(handle, "wb") as f:
            f.write(path.read_bytes())
            f.flush()
            return ctypes.CDLL(f"/proc/self/fd/{handle}")


@cache
def _own(cc: str, flags: tuple[str, ...], openmp: str | None, why: str) -> Built:
    """Kernels for this process alone, out of a folder that is gone when they are loaded."""
    try:
        with tempfile.TemporaryDirectory(prefix="outsize-") as name:  # of mode 0700
            path = Path(name) / "kernels.so"
            problem = _compile(cc, flags, path)
            made = _none(problem) if problem else _loaded(path, openmp)
    except OSError as e:
        return _none(f"{why}, nor can a temporary folder be used: {e.strerror}")
    if made.library is None:
        return made
    return made._replace(
        note=f"compiled kernels cannot be kept ({why}), so that each process compiles them anew, which takes "
        "some seconds; set OUTSIZE_HOME to a folder of yours"
    )


def _not_ours(folder: Path) -> str:
    """Make the folder, and say why code in it is not to be run; "" if it is. What others could write is
    closed to them and emptied."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode):
            return "it is a link"
        if found.st_uid not in _trusted():
            return "it belongs to another user"
        if found.st_mode & OTHERS_WRITE:
            folder.chmod(0o700)
            for path in folder.iterdir():
                path.unlink()
    except OSError as e:
        return f"it cannot be used: {e.strerror}"
    return ""


def _trusted() -> tuple[int, ...]:
    """Whose files are as good as one's own. (Windows gives every file to user 0.)"""
    return (0,) if sys.platform == "win32" else (os.geteuid(), 0)


def _is_as_built(path: Path) -> bool:
    """Is this file what was compiled here: no link, ours, writable by nobody else, with the hash noted?"""
    try:
        seen = []
        for p in (path, _hash_file(path)):
            found = p.lstat()
            if not stat.S_ISREG(found.st_mode) or found.st_uid not in _trusted():
                return False
            if found.st_mode & OTHERS_WRITE:
                return False
            seen.append((found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
        return _matches_hash(path, tuple(seen))
    except OSError:
        return False


@cache
def _matches_hash(path: Path, seen: tuple[tuple[int, ...], ...]) -> bool:
    """Once a process for files in the state `seen`. Raises OSError."""
    return _digest(path) == _hash_file(path).read_text(encoding="ascii", errors="replace")


def _hash_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _openmp_runtime() -> str | None:
    """The path of the GNU OpenMP runtime in this process, which importing torch loads."""
    return mapped("libgomp")


def mapped(name: str) -> str | None:
    """The path of a library in this process, by a part of its file's name."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return None
    lines = maps.read_text().splitlines()
    paths = (line.split(maxsplit=5)[-1] for line in lines if name in line)
    return next((path for path in paths if name in Path(path).name), None)


def processor() -> str:
    """Which processor this is, and what it can do."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    found = sorted({line for line in lines if line.startswith(PROCESSOR)})
    # Elsewhere than on Linux: a Mac's version names its chip.
    return "\0".join((platform.machine(), *(found or (platform.processor(), platform.version()))))


@cache
def _key(flags: tuple[str, ...]) -> str:
    """Names what is built: a hash of sources, flags and processor."""
    parts = (*(p.read_text() for p in (HEADER, *SOURCES)), *flags, processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _kept(cc: str, flags: tuple[str, ...], path: Path) -> str:
    """Compile the kernels into a folder that is ours, with their hash; why that failed, or ""."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as name:
            made = Path(name) / path.name
            problem = _compile(cc, flags, made)
            if problem:
                return problem
            _hash_file(made).write_text(_digest(made), encoding="ascii")
            for file in (made, _hash_file(made)):
                file.chmod(0o700)
                os.replace(file, path.parent / file.name)
    except OSError as e:
        return f"it cannot be written: {e.strerror}"
    return ""


def _compile(cc: str, flags: tuple[str, ...], path: Path) -> str:
    """Why it failed, or "". Raises OSError."""
    objects = [str(path.with_name(f"{source.stem}.o")) for source in SOURCES]
    each = [(cc, *flags, "-c", str(s), "-o", o) for s, o in zip(SOURCES, objects, strict=True)]
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_call, each))
        # Linked without -fopenmp: its symbols are found in the runtime already loaded.
        _call((cc, "-shared", *objects, "-o", str(path), "-lm", "-pthread"))
    except subprocess.CalledProcessError as e:
        lines = e.stderr.decode(errors="replace").splitlines()
        return f"{cc} failed: {next((s for s in lines if 'error' in s), 'no reason given')[:200]}"
    except subprocess.TimeoutExpired:
        return f"{cc} took too long"
    return ""


def _call(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=LIMIT_S)
