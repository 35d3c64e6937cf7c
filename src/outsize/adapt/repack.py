"""`outsize pack --bits`: from a pack to one of fewer bits; what cannot be is refused before it takes time."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from outsize.adapt import calibration, peak, rewrite
from outsize.adapt.bits import Stack
from outsize.adapt.fewer_bits import Candidates
from outsize.adapt.spill import Spill
from outsize.adapt.statistics import TENSORS
from outsize.adapt.trainable import TrainableModel, number_type
from outsize.arguments import real
from outsize.encoding.find import SIZES, encoding_of
from outsize.errors import OptionError, UnsupportedError
from outsize.home import home
from outsize.kernels.plain import PLAIN
from outsize.pack import derive, leftovers
from outsize.pack.format import Pack, Quality
from outsize.pack.source import derived
from outsize.pack.tables import Matrix
from outsize.plan.warmup import runtime_bytes
from outsize.progress import Progress, bars, steps
from outsize.storage.records import Records
from outsize.system import memory

METHOD = 2  # raise it where the same options would give other numbers
LOW = 8.0  # bits a weight, below which a model counts as quantized
TRIES = 6  # budgets, for the fewest bits of a given KL
LEAST, MOST = 2.0, 8.0


@dataclass(frozen=True, slots=True)
class BitsOptions:
    """What is wanted: so many bits a weight of the layers' matrices, everything counted; or the fewest that
    keep the divergence under `max_kl`; or both."""

    bits: float | None = None
    max_kl: float | None = None
    calibrate: Path | None = None
    force: bool = False
    memory: str | int = "auto"  # of this process, at most
    quiet: bool = False
    seed: int = 0  # of the model's own text

    def __post_init__(self) -> None:
        if self.bits is not None:
            real("bits", self.bits, LEAST, MOST)
        if self.max_kl is not None:
            real("max_kl", self.max_kl, 0.0, 100.0)
        if self.bits is None and self.max_kl is None:
            raise OptionError("neither bits nor max_kl is given; give bits, as 3.5")

    @property
    def name(self) -> str:
        """As the pack's name ends."""
        return f"kl{self.max_kl:g}" if self.bits is None else f"{self.bits:g}b"

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bits of the codes that matrices are tried in: those around what is wanted."""
        if self.bits is None:
            return SIZES
        first = min(max(SIZES[0], math.floor(self.bits - 0.2)), SIZES[-1])
        return tuple(s for s in SIZES if first <= s <= first + 2)


@dataclass(frozen=True, slots=True)
class Repacked:
    """A pack of few bits, and how long it took; no time where it was there before."""

    pack: Pack
    minutes: float | None


def repack(base: Pack, options: BitsOptions) -> Repacked:
    """Raises OptionError, UnsupportedError, DataError, PackError, DiskFullError."""
    begin, budget = time.monotonic(), memory.parse(options.memory)
    _check(base, options)
    text = None if options.calibrate is None else calibration.read(options.calibrate)
    source = derived(base.source, options.name, _recipe(options, text))
    folder = home() / "packs"
    found = derive.made_before(base, source, folder)
    if found is not None:
        return Repacked(found, None)
    name = "" if options.calibrate is None else options.calibrate.name
    given = None if text is None else calibration.given(base, text, name)
    kind = number_type(base, torch.device("cpu"))
    folder.mkdir(parents=True, exist_ok=True)
    peak.check(base, peak.peak_bytes(base, kind.itemsize, runtime_bytes(PLAIN)), budget)
    with bars(options.quiet) as progress:
        model = TrainableModel(base, torch.device("cpu"), kind, progress)
    with steps(options.quiet) as draw, Records(base) as records, leftovers.scratch(folder) as at:
        words = given or calibration.own(base, model, options.seed, draw)
        candidates = Candidates(model, words, records)
        candidates.make(options.sizes, Spill(at / "candidates"), draw)
        chosen, quality = _choose(candidates, options, draw)
        new, who = candidates.made(chosen), rewrite.Identity(source, quality)
        made = rewrite.write(base, records, new, base.description, who, draw)
    return Repacked(made, (time.monotonic() - begin) / 60)


def _recipe(options: BitsOptions, text: str | None) -> Mapping[str, object]:
    """All that decides the result."""
    words = None if text is None else hashlib.sha256(text.encode()).hexdigest()
    return {
        "made": "palettes", "method": METHOD, "bits": options.bits, "max_kl": options.max_kl,
        "text": words, "seed": options.seed,
    }  # fmt: skip


def _check(base: Pack, options: BitsOptions) -> None:
    """Refuse what is known to fail. Raises OptionError, UnsupportedError."""
    d = base.description
    if not d.is_usual:
        raise UnsupportedError(
            f"{base.path.name} is a {d.family} model; fewer bits are for dense models without sinks: leave "
            "--bits out, or give a checkpoint of fewer bits"
        )
    now = bits_of(base)
    if now < LOW and not options.force:
        raise OptionError(
            f"{base.path.name} has {now:.2f} bits a weight already, and quantizing twice loses twice; give "
            "the model in 16 bits, or --force"
        )
    least, weights = least_bytes(base)
    if options.bits is not None and options.bits * weights < 8 * least:
        raise OptionError(
            f"{options.bits:g} bits a weight are {options.bits * weights / 8e6:,.1f} MB for this model's "
            f"layers, and the smallest palettes with their tables take {least / 1e6:,.1f} MB; give --bits "
            f"{math.ceil(80 * least / weights) / 10:g} or more"
        )


def bits_of(base: Pack) -> float:
    """Of a weight of the layers' matrices, everything counted."""
    return rewrite.bits_of(base.tables)


def least_bytes(base: Pack) -> tuple[int, int]:
    """Bytes of the layers' matrices in the smallest palettes; and how many weights these have. Raises
    UnsupportedError."""
    size = weights = 0
    for t in base.tables:
        for name in TENSORS if t.kind == "layers" else ():
            pieces = t.tensors.get(name, ())
            rows = sum(m.num_rows for m in pieces)
            if rows:
                width = pieces[0].width
                least = Matrix(encoding_of(SIZES[0], width), rows, width, 0)
                size += len(t.keys) * least.size
                weights += len(t.keys) * rows * width
    return size, weights


def _choose(
    candidates: Candidates, options: BitsOptions, progress: Progress
) -> tuple[dict[Stack, int], Quality]:
    """What to pack, and how good it is. Raises OptionError."""
    if options.bits is not None:
        chosen = candidates.chosen(options.bits)
        quality = candidates.measure(chosen)
        if options.max_kl is not None and quality.kl > options.max_kl:
            raise OptionError(
                f"KL is {quality.kl:.3f} nats at {quality.bits:.2f} bits, and --max-kl is "
                f"{options.max_kl:g}; give more bits, or leave --bits out for the fewest that keep it"
            )
        return chosen, quality
    return _fewest(candidates, options.max_kl or 0.0, progress)


def _fewest(
    candidates: Candidates, max_kl: float, progress: Progress
) -> tuple[dict[Stack, int], Quality]:
    """The fewest bits of such a KL, by bisection. Raises OptionError."""
    chosen = candidates.uniform(SIZES[-1])
    quality = candidates.measure(chosen)
    if quality.kl > max_kl:
        raise OptionError(
            f"KL is {quality.kl:.3f} nats with the most bits that palettes have ({quality.bits:.2f}), and "
            f"--max-kl is {max_kl:g}; give a larger one"
        )
    low, high = candidates.bits(candidates.uniform(SIZES[0])), quality.bits
    for number in range(TRIES):
        progress("choosing bits", number, TRIES)
        bits = (low + high) / 2
        tried = candidates.chosen(bits)
        if (found := candidates.measure(tried)).kl <= max_kl:
            chosen, quality, high = tried, found, bits
        else:
            low = bits
    return chosen, quality
