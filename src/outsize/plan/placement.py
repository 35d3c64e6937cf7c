"""What goes where, worked out: the plan of one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from outsize.weights.residency import Share

ADAPTER = "adapter "  # and its name: a row of the plan
TEMPLATE = "template process"  # what the process that renders chat templates takes
TIDY_SHARE = 0.4  # of the scratch: so much below the plan, free memory is returned to the system
MEMORY, DISK, BY_ID, BY_ROUTER = "memory", "disk", "disk, rows by id", "disk, by router"  # tiers


@dataclass(frozen=True, slots=True)
class Placement:
    """The plan of one run. Bytes; the sum of `fixed` and `held` is what the process will have."""

    budget: int
    context: int
    least: int  # the smallest budget that works with this context
    fixed: Mapping[str, int]
    shares: Mapping[str, Share]
    groups: tuple[tuple[str, str, int], ...]  # (tensor group, tier, bytes)
    kv_tokens: int  # tokens of all sequences together that there is room for
    notes: tuple[str, ...] = field(default=())
    opening: int = 0  # what opening the model takes for a moment
    drafts: str = "none"  # what it leaves room for guessing ahead with

    @property
    def held(self) -> int:
        return sum(size for _, tier, size in self.groups if tier == MEMORY)

    @property
    def streamed(self) -> int:
        """Bytes that every pass reads from disk."""
        return sum(size for _, tier, size in self.groups if tier == DISK)

    @property
    def holds_head(self) -> bool:
        """Is all of the head in memory?"""
        tiers = {group.split(" ")[0]: tier for group, tier, _ in self.groups}
        return tiers.get("head", tiers.get("embed")) == MEMORY

    @property
    def planned(self) -> int:
        return max(sum(self.fixed.values()) + self.held, self.opening)

    @property
    def process(self) -> int:
        """Of `planned`, what the process itself has: all but the reserve for the system's share, and the
        process that renders chat templates."""
        return self.planned - self.fixed["reserve"] - self.fixed.get(TEMPLATE, 0)

    @property
    def later(self) -> int:
        """What is planned and taken only while answering."""
        return self.fixed["keys and values"] + self.fixed["scratch"]

    @property
    def ceiling(self) -> int:
        """From here on, free memory that the allocator keeps is returned."""
        return self.process - int(TIDY_SHARE * self.fixed["scratch"])

    def to_json(self) -> dict[str, object]:
        return {
            "budget_bytes": self.budget,
            "planned_bytes": self.planned,
            "process_bytes": self.process,
            "least_bytes": self.least,
            "context": self.context,
            "held_bytes": self.held,
            "streamed_bytes": self.streamed,
            "fixed": dict(self.fixed),
            "placement": [{"group": g, "tier": t, "bytes": b} for g, t, b in self.groups],
            "notes": list(self.notes),
        }
