"""`outsize bench cache`: recorded routing replayed under many policies; which one to use here, and why."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from outsize.arguments import real, whole
from outsize.caching.replay import sweep
from outsize.caching.replay.sweep import Row, Setting
from outsize.caching.replay.trace import Trace, read
from outsize.errors import OptionError
from outsize.options import CAPACITIES, EVICTIONS, parse_size
from outsize.progress import bars
from outsize.report.cache_page import page
from outsize.weights.spec import PROFILED, REPLAYED

NOT_CAUSAL = (*REPLAYED, PROFILED)  # the latter is told the trace's own profile here


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """The axes as a user writes them, comma-separated."""

    capacity: str = CAPACITIES
    eviction: str = EVICTIONS
    prefetch: str = "none"
    miss: str = "fetch"
    bandwidth: str = "1GB/s"
    record_bytes: int | None = None
    layer_ms: float = 0.0
    expert_ms: float = 0.0
    per_layer: bool = False

    def check(self) -> None:
        """Raises OptionError."""
        if self.record_bytes is not None:
            whole("record_bytes", self.record_bytes, 1, 1 << 40)
        real("layer_ms", self.layer_ms, 0.0, 1e6)
        real("expert_ms", self.expert_ms, 0.0, 1e6)


def show(
    paths: Sequence[Path],
    options: CacheOptions,
    as_json: bool,
    html: Path | None,
    config: Path | None,
    quiet: bool,
) -> None:
    """Replay, print, write the page; with `config`, make the engine use the best."""
    traces = tuple(read(path) for path in paths)
    rows = replay(traces, options, quiet)
    best, why = choose(rows)
    if html is not None:
        html.write_text(page(traces, rows, why), encoding="utf-8")
        print(f"wrote {html}", file=sys.stderr)
    if as_json:
        for row in rows:
            print(json.dumps(row))
    else:
        print("\n".join(_table(rows)))
    print(why, file=sys.stderr if as_json else sys.stdout)
    if config is not None:
        _write(config, best)


def replay(traces: tuple[Trace, ...], options: CacheOptions, quiet: bool) -> list[Row]:
    """All rows. Raises OptionError, UnsupportedError, TraceError."""
    options.check()
    setting = Setting(traces, options.record_bytes, options.layer_ms / 1e3, options.expert_ms / 1e3)
    grid = sweep.Grid(
        [_share(c) for c in _split(options.capacity)], _split(options.eviction),
        _split(options.prefetch), _split(options.miss), [_rate(b) for b in _split(options.bandwidth)],
        options.per_layer,
    )  # fmt: skip
    cells = grid.cells(len(traces))
    sweep.check(setting, cells)
    rows: list[Row] = []
    with bars(quiet) as progress:
        for done, found in enumerate(sweep.run(setting, cells), 1):
            rows += found
            progress("replaying", done, len(cells))
    return rows


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _share(text: str) -> float:
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise OptionError(f"capacity {text!r}: a share of all experts like 5% is expected")
    return share


def _rate(text: str) -> float:
    rate = float(parse_size(text.removesuffix("/s")))
    if rate <= 0:
        raise OptionError(f"bandwidth {text!r}: bytes a second like 1GB/s are expected")
    return rate


def choose(rows: Sequence[Row]) -> tuple[str, str]:
    """The causal, exact setting with the least stall, mean over everything, and the reason."""
    stalls: dict[str, list[float]] = {}
    hits: dict[str, list[float]] = {}
    for row in rows:
        if row["phase"] != "decode" or row["miss"] != "fetch":
            continue
        name = f"{row['eviction']},prefetch={row['prefetch']}"
        stalls.setdefault(name, []).append(float(row["stall_s_per_token"]))
        hits.setdefault(name, []).append(float(row["hit_rate"]))
    usable = {
        name: mean(found)
        for name, found in stalls.items()
        if not name.startswith(NOT_CAUSAL) and "oracle" not in name
    }
    if not usable:
        why = "nothing that an engine could use was replayed: add a causal policy, misses fetched"
        return "", why
    best, *rest = sorted(usable, key=lambda name: usable[name])
    why = f"use here: {_short(best)}: a mean stall of {usable[best] * 1e3:.3g} ms a token, "
    why += f"{mean(hits[best]):.1%} there"
    if rest:
        why += f"; next best {_short(rest[0])} with {usable[rest[0]] * 1e3:.3g} ms"
    return best, why


def _short(name: str) -> str:
    return name.removesuffix(",prefetch=none")


def _table(rows: Sequence[Row]) -> list[str]:
    out = [f"{'trace':<14}{'phase':<8}{'slots':>7}{'eviction':>14}{'prefetch':>14}{'miss':>11}"
           f"{'GB/s':>6}{'hits':>8}{'reuse':>8}{'stall ms':>10}{'collisions':>11}"]  # fmt: skip
    out += [
        f"{str(r['trace'])[:13]:<14}{r['phase']:<8}{r['capacity']:>7.1%}{r['eviction']:>14}"
        f"{r['prefetch']:>14}{r['miss']:>11}{float(r['bytes_per_s']) / 1e9:>6.3g}{r['hit_rate']:>8.3f}"
        f"{r['reuse_hit_rate']:>8.3f}{float(r['stall_s_per_token']) * 1e3:>10.3g}{r['collision_misses']:>11}"
        for r in rows
    ]
    return out


def _write(path: Path, best: str) -> None:
    """Set `experts` in config.toml, keeping all else."""
    if not best:
        raise OptionError("nothing that an engine could use was replayed; config.toml is unchanged")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    lines = [line for line in lines if not line.replace(" ", "").startswith("experts=")]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([f'experts = "{best}"', *lines]) + "\n", encoding="utf-8")
    print(f"wrote experts = {best!r} to {path}", file=sys.stderr)
