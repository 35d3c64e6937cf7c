"""Packs whose headers lie, with right checksums. `python -m tests.hostile_packs FOLDER [COUNT]` tries every
field of a pack with every value of a list (or so many of these, by a fixed seed), in a process that may grow
by 300 MB, and prints one JSON object.

Only OutsizeErrors may come out. A pack that opens must run, and its log-probabilities be finite.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import resource
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import outsize
from outsize.engine import load as loading
from outsize.errors import OutsizeError
from outsize.pack.format import HEADER

GROWTH = 300 << 20  # bytes of address space beyond what one sound pack takes
VALUES: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 63, 64, 4097, 2**24, 2**31, 2**40, 2**62, 2**63, 2**64, 10**400, 0.5, -0.0, 1e-320, 1e-30,
    1e5, 1e30, 1e308, math.nan, math.inf, -math.inf, True, False, None, "", "x", "../x", "\0", "fp32", "int4",
    "group8", "q8_0", "q2_k", "nvfp4", "palette3-fp16",
    "uint4-32", "fp8",
    "clamped_swiglu", "gelu", "rows", "experts", [], [0], ["x"], [[0]], {}, {"x": 0}, [0] * 9999,
)  # fmt: skip
Place = tuple[str | int, ...]
Change = Callable[[Any, Place], Any]  # of a header's body


def places(value: Any, at: Place = ()) -> Iterator[Place]:
    """Every field; of a list its first and its last item."""
    if at:
        yield at
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*at, key))
    elif isinstance(value, list):
        for i in sorted({0, len(value) - 1} if value else ()):
            yield from places(value[i], (*at, i))


def mutants(body: Any) -> Iterator[tuple[str, Place, Change]]:
    """Each field with each value, and a little more or less, twice, or not at all."""
    for place in places(body):
        original = _get(body, place)
        values = list(VALUES)
        if isinstance(original, int | float):
            values += [original + 1, original - 1, original * 2, original // 2, -original]
        if isinstance(original, list):
            values += [original[:-1], original * 2, original[::-1]]
        for value in values:
            if value is original or (value == original and type(value) is type(original)):
                continue
            yield f"{place} = {str(value)[:40]}", place, partial(_with, value)
        if isinstance(place[-1], str):
            yield f"{place} left out", place, _without
            yield f"{place} beside another", (*place[:-1], "more"), partial(_with, 0)


def _get(body: Any, place: Place) -> Any:
    for key in place:
        body = body[key]
    return body


def _with(value: Any, body: Any, place: Place) -> Any:
    made = copy.deepcopy(body)
    _get(made, place[:-1])[place[-1]] = value
    return made


def _without(body: Any, place: Place) -> Any:
    made = copy.deepcopy(body)
    del _get(made, place[:-1])[place[-1]]
    return made


def texts(body: Any) -> Iterator[tuple[str, str]]:
    """Headers that are no such JSON, or too much of it."""
    yield from {
        "nothing": "", "a list": "[]", "no pack": "{}", "nested": "[" * 200_000, "objects": '{"a":' * 100_000,
        "long": '{"pack": "' + "x" * (64 << 20) + '"}', "lists": "[" + "[]," * (20 << 20) + "[]]",
        "digits": '{"checksum": ' + "9" * 10_000 + "}", "bytes": "\udcff",
    }.items()  # fmt: skip
    for value in VALUES:
        yield f"the whole is {str(value)[:20]}", whole(value)


def whole(body: Any) -> str:
    sum = zlib.crc32(json.dumps(body, sort_keys=True).encode())
    return json.dumps({"checksum": sum, "pack": body})


def attempt(folder: Path) -> str:
    """Open and run; "sound", or the error's class. Anything but an OutsizeError goes up."""
    try:
        with outsize.load(str(folder), quiet=True) as model:
            logprobs, _ = model.score_tokens(
                [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22]
            )
            reply = model.generate("a", raw=True, max_tokens=3, temperature=0)[0]
            assert reply.new_tokens <= 3
            assert all(map(math.isfinite, logprobs)), logprobs
            assert max(logprobs) <= 0, logprobs
    except OutsizeError as e:
        if len(str(e)) < 20 or "\n" in str(e) or len(str(e)) > 4000:
            raise AssertionError(f"an error that says nothing, or too much: {e!r}") from e
        return type(e).__name__
    return "sound"


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + GROWTH
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def run(pack: Path, count: int | None = None) -> dict[str, int]:
    results = Counter[str]()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "m"
        folder.mkdir()
        for file in pack.iterdir():
            (folder / file.name).symlink_to(file)
        assert attempt(folder) == "sound"
        body = json.loads((pack / HEADER).read_text())["pack"]
        taken = loading.runtime_bytes()
        loading.runtime_bytes = lambda *_: taken  # measuring it takes longer than all else
        limit_memory()
        (folder / HEADER).unlink()
        made = list(mutants(body))
        chosen = made if count is None else random.Random(1).sample(made, count)
        for what, place, change in chosen:
            results[_tried(folder, what, whole(change(body, place)))] += 1
        for what, text in texts(body):
            results[_tried(folder, what, text)] += 1
    return dict(results)


def _tried(folder: Path, what: str, text: str) -> str:
    print(what[:200], file=sys.stderr, flush=True)  # a crash leaves it as the last line
    (folder / HEADER).write_text(text, encoding="utf-8", errors="surrogateescape")
    return attempt(folder)


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), *map(int, sys.argv[2:]))))
