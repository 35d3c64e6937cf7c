"""`outsize trace`: which experts a model uses, token by token, as `caching/replay/trace.py` reads them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO, cast

from outsize.caching.replay.trace import Scored
from outsize.checkpoint.bounded import text_lines
from outsize.checkpoint.read_json import loads
from outsize.engine import load as loading
from outsize.errors import OptionError, UnsupportedError
from outsize.pack.fetch import say
from outsize.pack.format import Pack
from outsize.plan.wishes import Wishes
from outsize.progress import bars

COLUMNS = ("turn", "phase", "step", "layer", "slot", "expert", "weight", "early", "early_weight")


class Recorder:
    """Writes what each layer chooses. The early gate of a layer is told with the layer before it."""

    def __init__(self, out: TextIO) -> None:
        self._write = csv.writer(out, lineterminator="\n").writerow
        self._turn, self._phase, self._step, self._tokens = 0, 0, 0, 0
        self._early: Scored = ()  # told with the layer before

    def begin(self, turn: int) -> None:
        """A new prompt."""
        self._turn, self._phase, self._step, self._tokens = turn, 0, 0, 0
        self._early = ()

    def __call__(
        self,
        layer: int,
        rows: Sequence[Sequence[int]],
        weights: Sequence[Sequence[float]],
        early: Scored,
    ) -> None:
        if layer == 0:
            self._step += self._tokens
            self._phase = int(self._step > 0)
            self._tokens = len(rows)
        told, self._early = self._early, early
        for at, (ids, ws) in enumerate(zip(rows, weights, strict=True)):
            last = at == len(rows) - 1  # the early gate speaks of the last token
            for slot in range(max(len(ids), len(told) if last else 0)):
                chosen = (ids[slot], round(ws[slot], 6)) if slot < len(ids) else (-1, 0)
                ahead = (
                    (told[slot][0], round(told[slot][1], 6))
                    if last and slot < len(told)
                    else (-1, 0)
                )
                self._write(
                    [self._turn, self._phase, self._step + at, layer, slot, *chosen, *ahead]
                )


def record(
    name: str, wishes: Wishes, threads: int | None, prompts: Path, output: Path, new: int, raw: bool
) -> None:
    """Answer every prompt and write the trace. Raises OptionError, UnsupportedError."""
    texts = _prompts(prompts)
    with open(output, "w", encoding="utf-8", newline="") as out:
        recorder = Recorder(out)
        with loading.load(
            name, memory=wishes.memory, context=wishes.context, threads=threads, quiet=wishes.quiet,
            experts=wishes.experts, defaults=wishes.defaults, recorder=recorder,
            draft="none",  # a guess is not what was said
        ) as model, bars(wishes.quiet) as progress:  # fmt: skip
            out.write(_header(model.pack))
            out.write(",".join(COLUMNS) + "\n")
            for turn, text in enumerate(texts):
                recorder.begin(turn)
                model.generate(text, max_tokens=new, raw=raw)
                progress("tracing", turn + 1, len(texts))
    if not wishes.quiet:
        say(f"wrote {output}: {len(texts)} prompts; replay it with `outsize bench cache {output}`")


def _header(pack: Pack) -> str:
    d = pack.description
    if d.mixture is None:
        raise UnsupportedError(
            f"{pack.path.name} has no experts to trace; give a mixture-of-experts model"
        )
    stride = max(t.stride for t in pack.tables if t.kind == "experts")
    return (
        "# route_trace v1\n"
        f"# model={pack.path.name} n_layer={d.num_layers} n_expert={d.mixture.count} "
        f"n_expert_used={d.mixture.used}\n# expert_bytes={stride}\n"
    )


def _prompts(path: Path) -> list[str]:
    """One a line: text, or JSON with a `prompt`, or the first of its `turns`."""
    lines = [line for line in text_lines(path, OptionError) if line.strip()]
    if not lines:
        raise OptionError(f"{path} holds no prompts; one a line is expected")
    return [_prompt(path, number, line) for number, line in enumerate(lines, 1)]


def _prompt(path: Path, number: int, line: str) -> str:
    if not line.lstrip().startswith("{"):
        return line
    try:
        item = cast("dict[str, Any]", loads(line))
        text = item["prompt"] if "prompt" in item else item["turns"][0]
    except (ValueError, KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise OptionError(f"{path}:{number}: a JSON object with a text `prompt` is expected")
    return text
