"""The compiled kernels for aarch64, as a library whose functions run in a program that qemu imitates the
processor for. `Native` takes it for the one of this machine, so any test of kernels may run with it."""

from __future__ import annotations

import ctypes
import gc
import mmap
import shutil
import struct
import subprocess
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from subprocess import PIPE
from typing import Any, NamedTuple

import pytest
from torch import Tensor

from outsize.kernels import build
from outsize.kernels.structs import AttentionTable

DRIVER = Path(__file__).with_name("csrc") / "calls.c"
PLACE, SIZE = 1 << 36, 1 << 28  # of memory, in the program
ALIGNED, BETWEEN = 64, 64  # of a block; bytes between two, which no kernel may touch
UNTOUCHED = b"\xa5"
ARGUMENTS = 10
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")
WARNINGS = ("-Wall", "-Wextra", "-Werror")
# As the compilers are found on Linux, with torch's OpenMP, and on a Mac, without.
COMPILERS = {
    "gcc": ("aarch64-linux-gnu-gcc", "-fopenmp"),
    "clang": ("clang", "--target=aarch64-linux-gnu", "-fopenmp-simd"),
}


def emulator() -> str | None:
    return next((path for path in map(shutil.which, EMULATORS) if path), None)


def missing(compiler: str) -> str:
    """What this machine lacks to compile and run the kernels for aarch64, or ""."""
    tools = {
        "aarch64-linux-gnu-gcc": shutil.which("aarch64-linux-gnu-gcc")
    }  # clang links with its libraries
    tools |= {
        COMPILERS[compiler][0]: shutil.which(COMPILERS[compiler][0]),
        EMULATORS[0]: emulator(),
    }
    return ", ".join(name for name, path in tools.items() if path is None)


def compile_program(compiler: str, arch: str, level: str, path: Path) -> None:
    """With the flags of a machine's own kernels, but for those of processor and optimization. A warning is
    an error."""
    cc, *own = COMPILERS[compiler]
    other = {build.OWN_PROCESSOR: f"-march={arch}", "-O3": level}
    assert set(other) <= set(build.FLAGS)
    flags = [*own, *(other.get(flag, flag) for flag in build.FLAGS)]
    objects = {source: path.with_name(f"{source.stem}.o") for source in (*build.SOURCES, DRIVER)}
    running = [
        subprocess.Popen([cc, *flags, *WARNINGS, "-c", str(source), "-o", str(to)])
        for source, to in objects.items()
    ]
    failed = [process.args for process in running if process.wait()]
    assert not failed
    linked = [*map(str, objects.values()), "-o", str(path), "-lm", "-pthread"]
    subprocess.run([cc, *own, "-static", *linked], check=True, capture_output=True)


class Call(ctypes.Structure):
    """As in calls.c."""

    _fields_ = (
        ("name", ctypes.c_char * 24), ("arguments", ctypes.c_long * ARGUMENTS), ("number", ctypes.c_double),
        ("result", ctypes.c_long),
    )  # fmt: skip


class Block(NamedTuple):
    """Memory of this process. `is_struct`: does it hold pointers?"""

    start: int
    size: int
    is_struct: bool


def living_blocks() -> Iterator[Block]:
    """All tensors and structures that were made after the program was started."""
    for found in gc.get_objects():
        kind = type(found)
        if issubclass(kind, Tensor) and found.is_cpu:
            storage = found.untyped_storage()
            yield Block(storage.data_ptr(), storage.nbytes(), False)
        elif issubclass(kind, ctypes.Structure | ctypes.Array):
            yield Block(ctypes.addressof(found), ctypes.sizeof(found), True)
        elif kind is AttentionTable:
            yield Block(found.pointer, found._cells.nbytes, True)


class Moved:
    """What one call needs of this process's memory, moved into a program's, where it lies from `at` on."""

    def __init__(self, memory: mmap.mmap, at: int) -> None:
        self._memory, self._at = memory, at
        self._blocks = sorted({block.start: block for block in living_blocks()}.values())
        self._starts = [block.start for block in self._blocks]
        self._content: dict[Block, tuple[int, bytes]] = {}

    def block(self, address: int) -> Block | None:
        block = self._blocks[bisect_right(self._starts, address) - 1]
        return block if block.start <= address < block.start + block.size else None

    def pointer(self, address: int) -> int:
        """Where the program has what is at an address here."""
        block = self.block(address)
        assert block is not None, "a pointer to what is neither a tensor nor a structure"
        if block not in self._content:
            at, content = self._at, ctypes.string_at(block.start, block.size)
            self._at += -(-(block.size + BETWEEN) // ALIGNED) * ALIGNED
            self._content[block] = at, content
            self._memory[at : self._at] = content.ljust(self._at - at, UNTOUCHED)
            if block.is_struct:
                words = [self._word(w) for (w,) in struct.iter_unpack("q", content)]
                self._memory[at : at + block.size] = struct.pack(f"{len(words)}q", *words)
        return PLACE + self._content[block][0] + address - block.start

    def _word(self, word: int) -> int:
        return word if self.block(word) is None else self.pointer(word)

    def take_back(self) -> None:
        """Whatever the program changed in tensors."""
        for block, (at, before) in self._content.items():
            end = at + block.size
            after, beyond = self._memory[at:end], self._memory[end : end + BETWEEN]
            assert beyond == UNTOUCHED * BETWEEN, "written beyond the end of a block"
            if after != before and not block.is_struct:
                ctypes.memmove(block.start, after, block.size)


class Emulated:
    """What ctypes.CDLL is for the C files, for a program that `compile_program` made."""

    def __init__(self, program: Path, memory: Path) -> None:
        self.file = memory.open("w+b")  # the program has it under the same number
        self.file.truncate(SIZE)
        self.memory, fds = mmap.mmap(self.file.fileno(), SIZE), (self.file.fileno(),)
        command = [str(emulator()), str(program), str(memory)]
        self.process = subprocess.Popen(command, stdin=PIPE, stdout=PIPE, bufsize=0, pass_fds=fds)
        gc.freeze()  # what was made before is not searched at each call

    def close(self) -> None:
        gc.unfreeze()
        self.process.communicate()
        self.memory.close()
        self.file.close()
        assert self.process.returncode == 0

    def __getitem__(self, name: str) -> Function:
        assert f"({name})" in DRIVER.read_text(), f"{DRIVER.name} cannot call {name} yet"
        return Function(self, name)

    __getattr__ = __getitem__


class Function:
    """One function of it, as ctypes has them."""

    argtypes: Sequence[Any] = ()
    restype: Any = ctypes.c_int

    def __init__(self, program: Emulated, name: str) -> None:
        self._program, self._name = program, name

    def __call__(self, *arguments: Any) -> Any:
        memory, number, words = self._program.memory, 0.0, [0] * ARGUMENTS
        moved, at = Moved(memory, ctypes.sizeof(Call)), 0
        for a, kind in zip(arguments, self.argtypes, strict=True):
            if kind is ctypes.c_float:
                number = a
                continue
            if isinstance(a, ctypes.Array):
                a = ctypes.addressof(a)
            words[at] = moved.pointer(a) if a and kind is ctypes.c_void_p else a or 0
            at += 1
        call = Call(self._name.encode(), (ctypes.c_long * ARGUMENTS)(*words), number)
        memory[: ctypes.sizeof(Call)] = bytes(call)
        self._run()
        moved.take_back()
        return self.restype and self.restype(Call.from_buffer_copy(memory).result).value

    def _run(self) -> None:
        process = self._program.process
        process.stdin.write(b"\n")  # type: ignore[union-attr]
        if process.stdout.read(1) != b"\n":  # type: ignore[union-attr]
            pytest.fail(f"{self._name} ended its program: {process.wait()}")
