"""Two tasks whose answers can be checked (nested_texts.py), at equal mean active parameters (nested_arms.py):
an item counts if every token of its answer is the likeliest, that is if greedy decoding would write it.

    python -m experiments.quality.nested_tasks NESTED-PACK BASE TASK... --items 64 -o FILE.jsonl"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from experiments.quality.nested_arms import Arms, Way
from experiments.runs import arguments, record
from outsize.adapt.calibration import start_of
from outsize.engine import open_tokens

AIMED, LENGTH = 4, 128  # items, and their first tokens, that thresholds are found on


def main() -> None:
    args = arguments(__doc__, "nested", "base", "tasks+", items=64, name="smol", shares=[0.5, 0.75],
                     arms="router,random,layers,static,skip", file="")  # fmt: skip
    arms, wanted = Arms(args.nested, args.base, args.file), args.arms.split(",")
    encode = partial(open_tokens.tokens(arms.base).encode, start=False)
    for task in args.tasks:
        lines = [json.loads(line) for line in Path(task).read_text().splitlines()][: args.items]
        start = list(start_of(arms.base))
        items = [(start + encode(row["prompt"]), encode(row["answer"])) for row in lines]
        said = {"model": args.name, "task": Path(task).stem, "items": len(items)}
        record({**said, "at": 1.0, "arm": "base", **_former(arms, items)}, args.output)
        if "full" in wanted:
            record(
                {**said, "at": 1.0, "arm": "full", **_row(arms, items, arms.whole())}, args.output
            )
        for share in args.shares:
            _share(arms, items, share, wanted, partial(_put, {**said, "at": share}, args.output))


Items = Sequence[tuple[list[int], list[int]]]


def _share(
    arms: Arms, items: Items, share: float, wanted: Sequence[str], put: Callable[..., None]
) -> None:
    some = torch.tensor([(p + a)[:LENGTH] for p, a in items if len(p) >= LENGTH][:AIMED])
    way = arms.routed(arms.at(some, share, arms.routed, True))
    found = _row(arms, items, way)
    real = found["share"]
    put("router", found)
    if "random" in wanted:
        put("random", _random(arms, items, way))
    if "layers" in wanted:
        put("layers", _row(arms, items, arms.by_layer(arms.at(some, real, arms.by_layer, False))))
    for arm, make in (("static", arms.static), ("skip", arms.skipped)):
        if arm in wanted:
            put(arm, _row(arms, items, make(real)))


def _put(said: dict[str, object], output: Path | None, arm: str, row: dict[str, float]) -> None:
    record({**said, "arm": arm, **row}, output)


def _is_right(arms: Arms, ids: Tensor, answer: int, states: Tensor) -> bool:
    """Are the last `answer` tokens what the states before them predict?"""
    logits = arms.model.logits(states[0, -answer - 1 : -1])
    return bool((logits.argmax(-1) == ids[0, -answer:]).all())


def _scored(rights: Sequence[bool], shares: Sequence[float]) -> dict[str, float]:
    p, n = sum(rights) / len(rights), len(rights)
    return {
        "share": round(sum(shares) / n, 4), "right": round(p, 4),
        "se": round(math.sqrt(p * (1 - p) / n), 4),
    }  # fmt: skip


def _former(arms: Arms, items: Items) -> dict[str, float]:
    rows = [(torch.tensor([p + a]), len(a)) for p, a in items]
    return _scored(
        [_is_right(arms, ids, n, arms.former(ids)) for ids, n in rows], [1.0] * len(rows)
    )


def _row(arms: Arms, items: Items, way: Way) -> dict[str, float]:
    rights, shares = list[bool](), list[float]()
    for prompt, answer in items:
        ids = torch.tensor([prompt + answer])
        seen = arms.run(ids, way)
        rights.append(_is_right(arms, ids, len(answer), seen.states))
        shares.append(arms.share(seen, way))
    return _scored(rights, shares)


def _random(arms: Arms, items: Items, way: Way) -> dict[str, float]:
    """Each item's widths of each layer, in an order by chance."""
    rights, shares = list[bool](), list[float]()
    for number, (prompt, answer) in enumerate(items):
        ids = torch.tensor([prompt + answer])
        mixed = arms.shuffled(arms.run(ids, way), number)
        seen = arms.run(ids, mixed)
        rights.append(_is_right(arms, ids, len(answer), seen.states))
        shares.append(arms.share(seen, mixed))
    return _scored(rights, shares)


if __name__ == "__main__":
    main()
