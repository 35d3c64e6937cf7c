"""Ours and what people would pick, in turn on the same files:
`python -m experiments.engine.compare MODEL.gguf... [--loops 0 1] [--wrap 'COMMAND {bytes}'] [-o FILE.jsonl]`.

Each pair is two fresh processes, ours and theirs, right after one another, since a shared machine's speed
drifts. Reports the median of each, and of the ratios pair by pair. With `--loops 0 1` each pair is run alone
and beside so many busy programs, in turn, and what is left of both own idle rates is reported.

With `--wrap` they run in too little memory: it caps memory, page cache included, and empties the page cache.
Caps are shares of the file. llama.cpp runs twice: as it comes (it copies some types into another layout,
outside the file's mapping), and with `--no-repack`, where the weights stay in the mapped file and can be
dropped. A safetensors folder is run against transformers with accelerate's offload to disk. One JSON object a
line.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

from experiments import runs
from experiments.memory import paging
from experiments.runs import (
    ACCELERATE,
    LLAMA,
    LLAMA_SERVER,
    OUTSIZE,
    WRAP,
    Row,
    arguments,
    busy,
    compared,
    fresh,
)

LIMIT_S = 1800
KEYS = ("decode_tokens_per_s", "prefill_tokens_per_s")


def ours(a: argparse.Namespace, model: str, cap: int) -> Row:
    if not cap:
        own = ["--threads", str(a.threads)] * (a.threads > 0)
        return fresh(*OUTSIZE, "bench", "speed", model, "--repeats", "1", "-q", *own)
    found = paging.run(a.wrap, cap, model, "--memory", str(cap), "--new", str(a.new))
    if "tokens_per_s" in found:
        found["prefill_tokens_per_s"] = round(paging.PROMPT / found["first_token_s"], 2)
        found["decode_tokens_per_s"] = found["tokens_per_s"]
    return {k: v for k, v in found.items() if k != "tokens"}


def theirs(a: argparse.Namespace, model: str, cap: int, as_it_comes: bool = False) -> Row:
    flags = ["--no-repack"] * ((a.no_repack or cap > 0) and not as_it_comes)
    command = [LLAMA, model, "--threads", str(a.threads or os.cpu_count()), *flags]
    if a.server:
        command = [LLAMA_SERVER, model, "--threads", command[3], "--server", a.server]
    if Path(model).is_dir():
        command = [ACCELERATE, model, "--cap", str(cap)]
    if cap:
        command += ["--new-tokens", str(a.new), *["--cold"] * (command[0] == LLAMA)]
    return fresh(*command, wrap=a.wrap, cap=cap, python=a.peer, limit_s=LIMIT_S)


def size_of(model: Path) -> int:
    files = model.glob("*.safetensors") if model.is_dir() else [model]
    return sum(f.stat().st_size for f in files)


def conditions(a: argparse.Namespace, model: str) -> list[Row]:
    """How each pair is run: beside so many busy programs, under a cap (0: none)."""
    if not a.wrap:
        return [{"beside": loops, "cap": 0} for loops in a.loops]
    size = size_of(Path(model))
    return [{"share": s, "beside": 0, "cap": max(a.least, int(size * s))} for s in a.shares]


def compare(a: argparse.Namespace, model: str) -> None:
    """A row for each condition."""
    wanted = conditions(a, model)
    pairs: list[list[tuple[Row, Row]]] = [[] for _ in wanted]
    for _ in range(a.pairs):
        for found, how in zip(pairs, wanted, strict=True):
            with busy(how["beside"]):
                found.append((ours(a, model, how["cap"]), theirs(a, model, how["cap"])))
    for found, how in zip(pairs, wanted, strict=True):
        good = [pair for pair in found if not any("error" in side for side in pair)]
        row: Row = {"model": Path(model).name, "pairs": a.pairs, "threads": a.threads, **how}
        for key in KEYS:
            row[key] = compared([o[key] for o, _ in good], [t[key] for _, t in good])
        if how["beside"] and not wanted[0]["beside"] and len(good) == a.pairs:
            for who, name in enumerate(("ours_kept", "theirs_kept")):
                kept = [
                    b[who][KEYS[0]] / i[who][KEYS[0]] for b, i in zip(found, pairs[0], strict=True)
                ]
                row[name] = round(statistics.median(kept), 3)
        row["ended"] = [side for pair in found for side in pair if "error" in side]
        if how["cap"]:
            row["ours"] = [o for o, _ in found]
            row["theirs_as_it_comes"] = theirs(a, model, how["cap"], as_it_comes=True)
        runs.record(row, a.output)


def main() -> None:
    a = arguments(
        __doc__, "models+", wrap=WRAP, pairs=5, new=(12, "tokens, under a cap"),
        threads=(0, "else what each takes; llama.cpp one a core"), loops=[0], shares=[0.75, 0.6, 0.5],
        least=(0, "caps are never below this many bytes"), peer=("", "the Python that has llama_cpp"),
        server=("", "llama-server, in place of that; without a cap"),
        no_repack=(False, "llama.cpp's weights stay in the file"),
    )  # fmt: skip
    for model in a.models:
        compare(a, model)


if __name__ == "__main__":
    main()
