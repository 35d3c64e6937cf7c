"""What is said of a model that is opened: that it is slow here, or that its answers are not exact."""

from __future__ import annotations

from outsize.encoding.find import NATIVE
from outsize.forward.prune import parse_prefill
from outsize.kernels.backend import Backend
from outsize.kernels.plain import PLAIN
from outsize.log import warn
from outsize.options import LoadOptions
from outsize.pack.format import Pack
from outsize.plan.placement import Placement
from outsize.weights.spec import ExpertOptions


def slow(made: Pack, native: Backend) -> None:
    """Where kernels are missing that its encodings need."""
    grouped = [name for name in made.encodings if name in NATIVE and name != "int4"]
    if grouped and native is PLAIN:
        warn(
            f"{made.path.name} holds {', '.join(grouped)}, which without compiled kernels runs about "
            "20 times slower; install a C compiler, or pack again with --encoding int8"
        )


def noted(
    placement: Placement, options: LoadOptions, experts: ExpertOptions, width: tuple[float, str]
) -> None:
    """What a plan says of itself, and which options change answers. `width`: what share of nested experts the
    options came to, and what that costs."""
    for note in placement.notes:
        warn(note)
    if experts.is_lossy:
        warn(f"{experts.lossy} changes the model's answers; leave it out for the exact ones")
    if parse_prefill(options.prefill) is not None:
        warn(f"prefill={options.prefill} is lossy: answers change; leave it out for the exact ones")
    share, cost = width
    if share < 1:
        warn(f"width={options.width} ({share:.2f} of the feed-forwards) is {cost}; full is exact")
