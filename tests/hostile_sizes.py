"""Foreign files that are small on disk, or large, and want much memory: sparse files, long headers, many tiny
values. `python -m tests.hostile_sizes` runs all and prints one JSON object; names of cases may follow.

Each is opened in a process of its own that may take 300 MB beyond what it has. Only OutsizeErrors may come
out; whatever is none, a MemoryError among them, ends the process with status 1.
"""

from __future__ import annotations

import gzip
import json
import os
import resource
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain, repeat
from pathlib import Path

from outsize.caching.replay import trace
from outsize.checkpoint import lora as adapters
from outsize.checkpoint.opening import open_checkpoint
from outsize.errors import OutsizeError
from outsize.pack.outline import of_checkpoint
from outsize.text import prompt_file
from tests.golden import tiny
from tests.golden.test_golden import write_gguf

LIMIT = 300 << 20  # bytes that a case may take
SECONDS = 20
MB = 1 << 20
Open = Callable[[Path], object]
# What fills a JSON file: its beginning, what is repeated, its end.
FILLERS = {
    "lists": (b'{"a":[', b"[],", b"0]}"),
    "objects": (b'{"a":[', b'{"":0},', b"0]}"),
    "keys": (b"{", b'"\\u1234":{},', b'"":0}'),
    "numbers": (b'{"a":[', b"0,", b"0]}"),
    "text": (b'{"a":"\xf0\x9f\x98\x80', b"aaaaaaaa", b'"}'),
    "spaces": (b'{"a":0', b" " * 8, b"}"),
    "depth": (b'{"a":', b'{"a":', b"0"),
    "merges": (b'{"model":{"type":"BPE","vocab":{},"merges":[', b'["",""],', b'["",""]]}}'),
    "tokens": (b'{"model":{"type":"BPE","vocab":{},"merges":[]},"added_tokens":[',
               b'{"id":0,"content":"x"},', b'{"id":0,"content":"x"}]}'),
}  # fmt: skip
FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    "special_tokens_map.json", "model.safetensors.index.json", "model.safetensors",
    "chat_template.jinja", "adapter_config.json", "adapter_model.safetensors",
)  # fmt: skip


def fill(path: Path, filler: str, size: int) -> None:
    """About `size` bytes; as a header where the file has one."""
    start, middle, end = FILLERS[filler]
    count = max(0, size - len(start) - len(end)) // len(middle)
    with open(path, "wb") as f:
        if path.suffix == ".safetensors":
            f.write(struct.pack("<Q", len(start) + count * len(middle) + len(end)))
        f.write(start)
        block = max(1, MB // len(middle))
        for at in range(0, count, block):
            f.write(middle * min(block, count - at))
        f.write(end)


def text_case(name: str, filler: str, size: int) -> Callable[[Path], tuple[Path, Open]]:
    """One file of a folder, of `size` bytes."""

    def make(base: Path) -> tuple[Path, Open]:
        folder = tiny.write_folder(base / "m", "llama")
        if name.startswith("adapter"):
            (folder / "adapter_config.json").write_text('{"peft_type":"LORA","r":1,"lora_alpha":1}')
            fill(folder / "adapter_model.safetensors", "spaces", 100)
        fill(folder / name, filler, size)
        return folder, adapters.load if name.startswith("adapter") else plan

    return make


def plan(path: Path) -> object:
    """What `outsize plan` does with a model: everything but its weights."""
    return of_checkpoint(open_checkpoint(path), "m", "auto", True)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def gguf_case(
    tensors: int, keys: int, body: bytes, size: int
) -> Callable[[Path], tuple[Path, Open]]:
    """A GGUF of these counts, and after `body` holes up to `size` bytes."""

    def make(base: Path) -> tuple[Path, Open]:
        path = base / "m.gguf"
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + body)
        if size:
            os.truncate(path, size)
        return path, plan

    return make


def gguf_cases() -> Iterator[tuple[str, Callable[[Path], tuple[Path, Open]]]]:
    key = string(b"tokenizer.ggml.tokens")
    for size in (1 << 30, 200 << 30):
        name = f"{size >> 30}G"
        long = key + struct.pack("<IQ", 8, size - 1000)
        yield f"gguf-string-{name}", gguf_case(1, 1, long, size)
        for kind, width in ((0, 1), (8, 8), (9, 12), (12, 8)):
            array = key + struct.pack("<IIQ", 9, kind, (size - 1000) // width)
            yield f"gguf-array{kind}-{name}", gguf_case(1, 1, array, size)
        yield f"gguf-tensors-{name}", gguf_case((size - 1000) // 24, 0, b"", size)
        yield f"gguf-keys-{name}", gguf_case(0, (size - 1000) // 13, b"", size)
    count = 10_000_000
    empty = key + struct.pack("<IIQ", 9, 8, count) + bytes(8 * count)
    yield "gguf-empty-strings", gguf_case(1, 1, empty, 0)
    wide = (
        string(b"k") + struct.pack("<I", 8) + string("\N{GRINNING FACE}".encode() + bytes(15 * MB))
    )
    many = b"".join(string(b"k%d" % i) + wide[9:] for i in range(6))
    yield "gguf-wide-strings", gguf_case(1, 6, many, 0)


def big_vocabulary(base: Path) -> tuple[Path, Open]:
    """Sound, and as large as the largest: what is allowed must fit, too."""
    folder = tiny.write_folder(base / "m", "llama")
    vocab = {f"\N{LOWER ONE EIGHTH BLOCK}piece{i}": i for i in range(262_144)} | {
        "\N{GRINNING FACE}": 262_144
    }
    merges = [[f"\N{LOWER ONE EIGHTH BLOCK}pi{i}", "ece"] for i in range(514_000)]
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["model"] = {"type": "BPE", "vocab": vocab, "merges": merges}
    whole["added_tokens"] = []
    text = json.dumps(whole, ensure_ascii=False, indent=2)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    return folder, plan


def sparse_tensors(base: Path) -> tuple[Path, Open]:
    """A sound GGUF whose file goes on for 200 GB."""
    path = write_gguf(base / "m.gguf", "llama")
    os.truncate(path, 200 << 30)
    return path, plan


HEAD = b"# n_layer=%d n_expert=%d n_expert_used=1\nphase,step,layer,slot,expert,weight\n"


def trace_case(rows: Callable[[], Iterator[bytes]], shape: tuple[int, int] = (2, 8)) -> Callable[
    [Path], tuple[Path, Open]
]:  # fmt: skip
    def make(base: Path) -> tuple[Path, Open]:
        path = base / "t.route.csv.gz"
        with gzip.open(path, "wb", 1) as f:
            for piece in chain([HEAD % shape], rows()):
                f.write(piece)
        return path, trace.read

    return make


def decoding() -> Iterator[bytes]:
    for start in range(0, 8_000_000, 100_000):
        yield b"".join(b"1,%d,0,0,1,.5\n" % i for i in range(start, start + 100_000))


def prompt() -> Iterator[bytes]:
    for start in range(0, 8_000_000, 100_000):
        yield b"".join(b"0,%d,0,0,1,.5\n" % i for i in range(start, start + 100_000))


def prompts(middle: bytes, count: int) -> Callable[[Path], tuple[Path, Open]]:
    def make(base: Path) -> tuple[Path, Open]:
        path = base / "p.jsonl.gz"
        with gzip.open(path, "wb", 1) as f:
            for _ in range(count):
                f.write(middle)
        return path, lambda p: prompt_file.read([p])

    return make


@cache
def cases() -> dict[str, Callable[[Path], tuple[Path, Open]]]:
    """All of them by name."""
    found = {
        f"{name}-{filler}-{size}M": text_case(name, filler, size * MB)
        for name in FILES
        for filler in FILLERS
        for size in (40, 100)
    }
    found |= dict(gguf_cases())
    found |= {
        "gguf-sparse": sparse_tensors,
        "big-vocabulary": big_vocabulary,
        "trace-bomb": trace_case(lambda: repeat(bytes(MB), 600)),
        "trace-comments": trace_case(lambda: repeat(b"#\n" * 500_000, 500), (0, 0)),
        "trace-decoding": trace_case(decoding),
        "trace-prompt": trace_case(prompt),
        "trace-shape": trace_case(lambda: iter([b"1,0,0,0,1,.5\n"]), (60_000, 60_000)),
        "prompts-bomb": prompts(bytes(MB), 600),
        "prompts-deep": prompts(b"[" * MB, 4),
    }
    return found


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))


def attempt(path: Path, call: Open) -> str:
    """In this process, from here on bounded. The error's class, or "sound"."""
    most = status("VmData") + LIMIT
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    try:
        call(path)
    except OutsizeError as e:
        if not 20 < len(str(e)) < 1000:
            raise AssertionError(f"an error that says nothing, or everything: {e!r}"[:2000]) from e
        return type(e).__name__
    return "sound"


def run(name: str, base: Path) -> dict[str, object]:
    """One case, in a fork. Raises AssertionError with the case's name."""
    path, call = cases()[name](base)
    out, into = os.pipe()
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            before = status("VmRSS")
            said = attempt(path, call)
            os.write(into, json.dumps([said, (status("VmHWM") - before) // MB]).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    os.close(into)
    _, state = os.waitpid(child, 0)
    with os.fdopen(out, "rb") as f:
        said = f.read()
    assert os.waitstatus_to_exitcode(state) == 0, f"{name}: status {state}"
    kind, grown = json.loads(said)
    return {"result": kind, "grown_mb": grown, "seconds": round(time.perf_counter() - started, 2)}


def main(names: list[str]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name in names or list(cases()):
        with tempfile.TemporaryDirectory() as base:
            found[name] = run(name, Path(base))
            print(name, found[name], file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
