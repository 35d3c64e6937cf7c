"""Decoding and prompts of the 1B shape: `python -m experiments.memoryllm.speed PACKS.json TOKENS.gguf TEXT -o
ROWS.jsonl` (PACKS.json: of full_size.py). The table in memory, the table on disk (`--disk`: bytes for all),
and computed feed-forwards, all opened at once and run in turn, some tokens each; the first turn is not
counted. With `--memory BYTES` each of the two packs by itself in a process that has so much.

Decoding is fed a text's own tokens (behind those that ordered the rows), or tokens of which each is another,
so that every row is a read. Ratios are pair by pair.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

import outsize
from experiments.memoryllm.full_size import ORDERED, SIZE, stream
from experiments.runs import Row, arguments, compared, fresh, good, record
from outsize.engine.model import Model
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.kv.kv import KV
from outsize.system.memory import peak

PROMPT, TURN, TURNS = 512, 24, 11
RATIOS = ("disk", "memory"), ("memory", "computed"), ("disk", "computed")


class Running:
    """A model on its way through a stream."""

    def __init__(self, model: Model, ids: Sequence[int]) -> None:
        self._transformer, self._ids, self._at = model.transformer, ids, 0
        self._kv: KV = model.transformer.new_kv()

    def turn(self, count: int) -> float:
        """Tokens/s of the next ones, one by one."""
        t, begin = self._transformer, time.perf_counter()
        with t.threads.narrow(True):
            for _ in range(count):
                full(t, [Span(self._at, [self._ids[self._at]])], [self._kv])
                self._at += 1
        return count / (time.perf_counter() - begin)


def open_all(stack: ExitStack, packs: dict[str, str], disk: str) -> dict[str, Model]:
    """The one on disk first, since what others hold would count as its own."""
    how = {"disk": ("table", disk), "memory": ("table", "auto"), "computed": ("computed", "auto")}
    return {
        name: stack.enter_context(
            outsize.load(packs[pack], memory=memory, context=1024, draft="none", quiet=True)
        )
        for name, (pack, memory) in how.items()
    }


def about(model: Model) -> Row:
    """How a model is held."""
    table = model.transformer.loaded.tokens
    return {} if table is None else {"slots": table.cache.slots, "rows": len(table.cache.table)}


def ratios(speeds: dict[str, list[float]]) -> Row:
    pairs = [(a, b) for a, b in RATIOS if a in speeds and b in speeds]
    return {f"{a}_of_{b}": compared(speeds[a], speeds[b]) for a, b in pairs}


def decode(models: dict[str, Model], ids: Sequence[int]) -> Row:
    """All models in turn through one stream."""
    running = {name: Running(model, ids) for name, model in models.items()}
    before = {name: model.counts().experts for name, model in models.items()}
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(TURNS):
        for name, one in running.items():
            speed = one.turn(TURN)
            if turn:
                speeds[name].append(round(speed, 3))
    misses = {n: m.counts().experts.misses - before[n].misses for n, m in models.items()}
    return {"tokens": TURN * TURNS, "misses": misses, **ratios(speeds)}


def prefill(models: dict[str, Model], ids: Sequence[int], turns: int) -> Row:
    """All models in turn over stretches of a text."""
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(turns + 1):
        some = ids[turn * PROMPT : (turn + 1) * PROMPT]
        for name, model in models.items():
            begin = time.perf_counter()
            full(model.transformer, [Span(0, some)], [model.transformer.new_kv()])
            if turn:
                speeds[name].append(round(PROMPT / (time.perf_counter() - begin), 2))
    return {"prompt_tokens": PROMPT, **ratios(speeds)}


def alone(pack: str, memory: str, ids: Sequence[int]) -> Row:
    """One model in so much memory."""
    with outsize.load(pack, memory=memory, context=1024, draft="none", quiet=True) as model:
        running, before = Running(model, ids), model.counts()
        running.turn(TURN)
        speeds = [round(running.turn(TURN), 3) for _ in range(3)]
        read = model.counts().total.bytes_read - before.total.bytes_read
        told = {"tokens_per_s": speeds, "bytes_per_token": round(read / (4 * TURN))}
        return told | about(model) | {"peak": peak()}


def main() -> None:
    told = arguments(
        __doc__, "packs", "model", "text", disk="1GB", memory="", one="", turns=4, threads=2
    )
    torch.set_num_threads(told.threads)
    packs = json.loads(Path(told.packs).read_text())
    ids = stream(Path(told.model), Path(told.text), 2 * ORDERED)[ORDERED:]
    if told.one:
        print(json.dumps(alone(packs[told.one], told.memory, ids)))
        return
    base: Row = {"threads": told.threads}
    if told.memory:
        for name in ("computed", "table"):
            words = ["-m", __spec__.name, told.packs, told.model, told.text, "--one", name]
            found = good(fresh(*words, "--memory", told.memory, "--threads", str(told.threads)))
            record(
                base | {"what": "capped", "pack": name, "memory": told.memory} | found, told.output
            )
        return
    with ExitStack() as stack:
        models = open_all(stack, packs, told.disk)
        base |= {name: about(model) for name, model in models.items()}
        others = random.Random(0).sample(range(SIZE.vocab), TURN * TURNS)
        record(base | {"what": "decode", "stream": "text"} | decode(models, ids), told.output)
        record(base | {"what": "decode", "stream": "others"} | decode(models, others), told.output)
        tables = {name: models[name] for name in ("disk", "memory")}
        record(base | {"what": "prefill"} | prefill(tables, ids, told.turns), told.output)


if __name__ == "__main__":
    main()
