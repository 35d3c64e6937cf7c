"""Mutated model files. `python -m tests.hostile 2000 1 quantized` runs many and prints one JSON object.

Each mutant goes the whole way: parse, recipe, plan, tokenizer, pack. Only OutsizeErrors may come out,
each within the time limit, and the process may not grow beyond the memory limit.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from outsize.checkpoint.opening import open_checkpoint
from outsize.errors import OutsizeError
from outsize.pack import write
from outsize.progress import silent
from tests.checkpoint import blocks, quantizers
from tests.checkpoint.quantizers import FORMATS
from tests.golden import tiny
from tests.golden.test_golden import write_gguf

Mutation = Callable[[random.Random, bytearray], None]
HEADER = 12_000  # most of what can be said wrongly is said here


def flip_bits(r: random.Random, data: bytearray) -> None:
    for _ in range(r.choice((1, 1, 2, 8, 64))):
        data[r.randrange(min(len(data), HEADER))] ^= 1 << r.randrange(8)


def flip_numbers(r: random.Random, data: bytearray) -> None:
    """Also of what lies behind the header: zero points, the groups of inputs, shapes."""
    for _ in range(r.choice((1, 8))):
        data[r.randrange(len(data))] = r.choice((0, 1, 127, 128, 255))


def truncate(r: random.Random, data: bytearray) -> None:
    del data[r.randrange(len(data)) :]


def huge_number(r: random.Random, data: bytearray) -> None:
    at = r.randrange(0, min(len(data), HEADER) - 8)
    value = r.choice((2**64 - 1, 2**63, 2**62, 2**48, 2**32, 2**31, 10**9, 0))
    struct.pack_into("<Q", data, at, value)


def huge_counts(r: random.Random, data: bytearray) -> None:
    at = r.choice((0, 8, 16))
    struct.pack_into("<Q", data, at, r.choice((2**64 - 1, 2**40, 2**33, 10**7, 1, 0)))


def copy_stretch(r: random.Random, data: bytearray) -> None:
    """Duplicate names and keys arise so."""
    size, limit = r.randrange(4, 400), min(len(data), HEADER) - 400
    source, target = r.randrange(limit), r.randrange(limit)
    data[target : target + size] = data[source : source + size]


def insert_or_delete(r: random.Random, data: bytearray) -> None:
    at, size = r.randrange(min(len(data), HEADER)), r.randrange(1, 40)
    if r.random() < 0.5:
        del data[at : at + size]
    else:
        data[at:at] = bytes(r.randrange(256) for _ in range(size))


def wrong_type(r: random.Random, data: bytearray) -> None:
    """Small numbers are value types, tensor types and ranks: make them others."""
    spots = [i for i in range(24, min(len(data), HEADER) - 4) if data[i + 1 : i + 4] == b"\0\0\0"]
    for _ in range(r.choice((1, 3))):
        data[r.choice(spots or [24])] = r.randrange(64)


def nested_arrays(r: random.Random, data: bytearray) -> None:
    """A metadata key whose value is arrays of arrays of arrays."""
    key, depth = b"evil", r.choice((2, 5, 300, 3000))
    body = struct.pack("<Q", len(key)) + key + struct.pack("<I", 9)
    body += struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 4, 0)
    data[24:24] = body
    count = struct.unpack_from("<Q", data, 16)[0] + 1
    struct.pack_into("<Q", data, 16, count % 2**64)


def swap_word(r: random.Random, data: bytearray) -> None:
    """Change a name, a key or a number written as text."""
    words = (b"weight", b"F32", b"shape", b"offsets", b"llama", b"rope", b"count", b"blk.1", b"64")
    word = r.choice([w for w in words if w in data] or [b"\0"])
    at = data.find(word)
    data[at : at + len(word)] = bytes(r.randrange(32, 127) for _ in word)


GGUF_ONLY = (huge_counts, nested_arrays)
MUTATIONS: tuple[Mutation, ...] = (
    flip_bits, flip_numbers, truncate, huge_number, huge_counts, copy_stretch, insert_or_delete, wrong_type,
    nested_arrays, swap_word,
)  # fmt: skip


def mutant(r: random.Random, seeds: dict[str, Path], folder: Path) -> tuple[Path, str]:
    """Write one mutated model; its path and what was done."""
    shutil.rmtree(folder, ignore_errors=True)
    kind = r.choice(sorted(seeds))
    if seeds[kind].is_dir():
        shutil.copytree(seeds[kind], folder)
        files = ("model.safetensors",) * 4 + ("config.json", "tokenizer.json")
        target = path = folder / r.choice(files)
        path = folder
    else:
        folder.mkdir()
        target = path = Path(shutil.copy(seeds[kind], folder / "m.gguf"))
    data = bytearray(target.read_bytes())
    names = []
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        usable = (
            MUTATIONS if kind.startswith("gguf") else [m for m in MUTATIONS if m not in GGUF_ONLY]
        )
        mutation = r.choice(usable)
        if len(data) > 1000:
            mutation(r, data)
            names.append(mutation.__name__)
    target.write_bytes(data)
    return path, f"{kind}:{target.name}:{'+'.join(names)}"


def quiet(text: str) -> None:
    """What a user would be told."""


def attempt(path: Path, home: Path) -> str:
    """The whole way; "sound", or the error's class. Anything but an OutsizeError goes up."""
    try:
        how = write.PackOptions(str(path), "auto", True, "test")
        made = write.write(open_checkpoint(path), how, home, silent, quiet, quiet)
    except OutsizeError as e:
        if len(str(e)) < 20:
            raise AssertionError(f"an error that says nothing: {e!r}") from e
        return type(e).__name__
    shutil.rmtree(made.path)
    return "sound"


def made(root: Path, what: str) -> dict[str, Path]:
    """What is to be mutated: models as they are, or quantized safetensors."""
    if what == "quantized":
        how = ("awq", "gptq-zeros", "packed-zeros", "fp8-blocks", "int8", "nvfp4")
        return {name: quantizers.write_folder(root / name, "llama", FORMATS[name]) for name in how}
    return {
        "gguf": write_gguf(root / "seed.gguf", "llama"),
        "gguf_types": blocks.write_model(root / "types.gguf", blocks.matrices()),
        "safetensors": tiny.write_folder(root / "seed", "qwen3"),
    }


def run(count: int, seed: int, what: str = "plain") -> dict[str, object]:
    r, results, slowest = random.Random(seed), Counter[str](), 0.0
    with tempfile.TemporaryDirectory() as base:
        root = Path(base)
        seeds = made(root, what)
        for path in seeds.values():
            attempt(path, root / "home")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(count):
            path, what = mutant(r, seeds, root / "mutant")
            started = time.perf_counter()
            try:
                results[attempt(path, root / "home")] += 1
            except BaseException:
                print(f"mutant {number} of seed {seed} ({what}) broke through", file=sys.stderr)
                raise
            slowest = max(slowest, time.perf_counter() - started)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "mutants": count, "seed": seed, "results": dict(results),
        "slowest_s": round(slowest, 3), "memory_grown_mb": grown // 1024,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]), int((*sys.argv, 1)[2]), *sys.argv[3:])))
