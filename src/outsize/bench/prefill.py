"""`outsize bench prefill`: seconds to the first token against the prompt's length.

A prompt is computed whole; in lazy ways; and where all but its end is kept in memory, or on disk.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import track

from outsize.arguments import whole
from outsize.engine import load as loading
from outsize.engine.model import Model
from outsize.engine.open_prefixes import SHARED_CHUNK
from outsize.engine.prefixes import Prefixes
from outsize.engine.reply import Reply
from outsize.engine.stream import Streaming
from outsize.errors import ContextError, DataError, OptionError
from outsize.options import LoadOptions, Options
from outsize.prefix.disk import DiskBlocks
from outsize.report import prefill_page

NEW = 0.025  # share of a prompt that was not there before: 100 of 4,000 tokens
FULL, COLD, MEMORY, DISK = "full", "cold", "warm, memory", "warm, disk"
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PrefillOptions:
    """What to measure."""

    lengths: str = "512,1k,2k,4k"  # tokens of prompts
    prompts: Path | None = None  # a text that prompts are cut from; None: random tokens
    lazy: str = "lazy:gentle,lazy:fast"
    repeats: int = 3

    def __post_init__(self) -> None:
        whole("repeats", self.repeats, 1, 1000)
        sizes(self.lengths)


def sizes(text: str) -> list[int]:
    """Tokens, from 512,1k,... Raises OptionError."""
    out = []
    for item in text.lower().split(","):
        number = item.strip().removesuffix("k")
        if not number.isdigit() or int(number) < 1:
            raise OptionError(
                f"--lengths has {item!r}; numbers of tokens are expected, as 512,1k,4k"
            )
        out.append(int(number) * (1024 if item.strip().endswith("k") else 1))
    return sorted(set(out))


def ways(text: str) -> list[str]:
    """Settings of lazy prefill, which may have commas themselves: each begins with "lazy"."""
    return [f"lazy{part}" for part in f",{text}".split(",lazy")[1:]]


def show(
    name: str, options: PrefillOptions, load: LoadOptions, as_json: bool, html: Path | None
) -> None:
    """Print a table, or JSON; write a page. Raises OutsizeError."""
    with (
        tempfile.TemporaryDirectory(prefix="outsize-bench-") as folder,
        loading.open_model(name, load) as model,
    ):
        rows = list(_rows(model, options, load.quiet, Path(folder)))
        title = f"First token of {model.name}"
    if html is not None:
        html.write_text(prefill_page.page(title, rows), encoding="utf-8")
        print(f"wrote {html}", file=sys.stderr)
    print(json.dumps(rows) if as_json else _table(rows))


def _rows(model: Model, options: PrefillOptions, quiet: bool, folder: Path) -> Iterator[Row]:
    lengths = sizes(options.lengths)
    if lengths[-1] >= model.context:
        raise ContextError(
            f"--lengths goes to {lengths[-1]:,} tokens, the context holds {model.context:,}; give --context, "
            "or shorter ones"
        )
    text = _tokens(model, options.prompts, lengths[-1])
    bench = _Bench(model, folder)
    bench.first(text[: lengths[0]], FULL)  # the first of all is slower
    plan = [(n, repeat) for n in lengths for repeat in range(options.repeats)]
    shown = track(plan, "measuring", disable=quiet or not sys.stderr.isatty())
    found: dict[tuple[int, str], list[Reply]] = {}
    for number, (length, _) in enumerate(shown):
        start = (number * 997) % max(1, len(text) - length)
        ids = text[start : start + length]
        for mode, reply in bench.all(ids, ways(options.lazy)):
            found.setdefault((length, mode), []).append(reply)
    for (length, mode), replies in found.items():
        base = COLD if mode in (COLD, MEMORY, DISK) else FULL
        yield _row(length, mode, replies, found[length, base])


class _Bench:
    """Runs one prompt in all ways, in turn."""

    def __init__(self, model: Model, folder: Path) -> None:
        self._model, self._chunk = model, model.transformer.chunk
        disk = DiskBlocks(folder, 1 << 40, 1 << 40, True)
        backend = model.transformer.backend
        self._kept = Prefixes(SHARED_CHUNK, model.placement.kv_tokens, disk, backend=backend)

    def all(self, ids: Sequence[int], lazy: Sequence[str]) -> Iterator[tuple[str, Reply]]:
        yield FULL, self.first(ids, FULL)
        for way in lazy:
            yield way, self.first(ids, way)
        self._kept.clear()
        other = list(ids)  # another end, which is replaced
        new = max(1, int(NEW * len(ids)))
        other[-new:] = [ids[0]] * new
        yield COLD, self.first(other, COLD)
        yield MEMORY, self.first(ids, MEMORY)
        self._kept.flush()
        self._kept.clear()
        yield DISK, self.first(ids, DISK)

    def first(self, ids: Sequence[int], mode: str) -> Reply:
        """The first token of one prompt."""
        scheduler, network = self._model.scheduler, self._model.transformer
        shares = mode in (COLD, MEMORY, DISK)
        scheduler.prefixes = self._kept if shares else None
        network.chunk = SHARED_CHUNK if shares else self._chunk
        options = Options(max_tokens=1, ignore_eos=True)
        if mode.startswith("lazy"):
            options = options.with_changes({"prefill": mode})
        started = time.perf_counter()
        streaming = Streaming(scheduler, self._model.start(list(ids), options), started)
        for _ in streaming:
            pass
        return streaming.reply


def _tokens(model: Model, path: Path | None, least: int) -> list[int]:
    """What prompts are cut from. Raises DataError."""
    if path is None:
        draw = random.Random(0)
        return [draw.randrange(model.pack.description.vocab_size) for _ in range(4 * least)]
    try:
        found = model.tokens.encode(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror}") from None
    if len(found) < least:
        raise DataError(
            f"{path} has {len(found):,} tokens, and the longest prompt {least:,}; give a longer text"
        )
    return found


def _row(length: int, mode: str, replies: Sequence[Reply], base: Sequence[Reply]) -> Row:
    times = [r.first_token_s for r in replies]
    ratios = [a.first_token_s / b.first_token_s for a, b in zip(replies, base, strict=True)]
    return {
        "tokens": length,
        "mode": mode,
        "first_token_s": round(statistics.median(times), 4),
        "all_s": times,
        "of_base": round(statistics.median(ratios), 4),
        "reused_tokens": replies[-1].reused_tokens,
        "bytes_read": replies[-1].reused_bytes_read,
        "computed_share": replies[-1].computed_share,
    }


def _table(rows: Sequence[Row]) -> str:
    """Lines: a length, a way, seconds, its share of the time that it is compared with."""
    out = [f"{'tokens':>8}  {'way':32}{'first token':>12}  share of full or cold"]
    for row in rows:
        more = f", {row['reused_tokens']:,} reused" if row["reused_tokens"] else ""
        if row["computed_share"] < 1:
            more = f", lossy: {row['computed_share']:.0%} computed"
        took = f"{row['first_token_s']:>10.3f} s  {row['of_base']:.1%}{more}"
        out.append(f"{row['tokens']:>8,}  {row['mode']:32}{took}")
    return "\n".join(out)
