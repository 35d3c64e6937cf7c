"""What distilling a changed model ends with: an ordinary pack, and what it was before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from outsize.adapt import rewrite
from outsize.adapt.distill.data import Data, predicted
from outsize.adapt.divergence import Divergence
from outsize.adapt.examples import TrainOptions
from outsize.adapt.loop import Training
from outsize.adapt.processes import processes
from outsize.adapt.repack import bits_of
from outsize.adapt.run import done
from outsize.model_config import Description
from outsize.pack.derive import New
from outsize.pack.format import Pack, Quality
from outsize.pack.source import derived
from outsize.progress import steps
from outsize.storage.records import Records

Ends = tuple[Mapping[str, Divergence], Mapping[str, Divergence]]


@dataclass(frozen=True, slots=True)
class Made:
    """A pack that was made of another, and how far its predictions are from that one's, by kind of text: as
    training began, and after so many steps."""

    base: Pack
    pack: Pack
    begun: Mapping[str, Divergence]
    after: Mapping[str, Divergence]
    steps: int


def quality(
    pack: Pack, found: Mapping[str, Divergence], data: Data, where: TrainOptions
) -> Quality:
    """As a pack says it of itself: on the first kind of what was held out."""
    kind = next(iter(found))
    count = sum(predicted(e) for e in data.held_out[kind])
    names = ", ".join(path.name for path in where.data)
    return Quality(bits_of(pack), *found[kind], count, f"{kind} held out of {names}")


def finish(
    of: tuple[Pack, Description, str],
    records: Records,
    new: New,
    recipe: Mapping[str, object],
    trained: tuple[TrainOptions, Training, Data, Ends],
) -> Made:
    """Write the pack. `of`: what it is made from, what it becomes, and how its name ends. Raises PackError,
    DiskFullError."""
    (base, d, name), (where, training, data, (begun, after)) = of, trained
    ending = name if base.source.encoding == "auto" else f"{base.source.encoding}-{name}"
    source = derived(base.source, ending, recipe)
    measured = quality(base, after, data, where)
    made = base
    if processes()[0] == 0:
        with steps(where.quiet) as draw:
            who = rewrite.Identity(source, measured)
            made = rewrite.write(base, records, new, d, who, draw)
    done(where)
    return Made(base, made, begun, after, training.step)
