"""The placement of a model for a budget: what is in memory, what is read from disk, in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from outsize.weights.residency import Share

ADAPTER = "adapter "  # and its name: a row of the plan
TEMPLATE = "template process"  # what the process that renders chat templates takes
TIDY_SHARE = 0.4  # of the scratch: so much below the plan, free memory is returned to the system
MEMORY, DISK, BY_ID, BY_ROUTER = "memory", "disk", "disk, rows by id", "disk, by router"  # tiers
BY_TOKEN = "disk, rows by token"
BY_PROMPT = "disk, for prompts"  # what no step of few rows reads


@dataclass(frozen=True, slots=True)
class Placement:
    """What is where. All sizes in bytes; the sum of `fixed` and `held` is what the process will have."""

    budget: int
    context: int
    least: int  # the smallest budget that works with this context
    fixed: Mapping[str, int]
    shares: Mapping[str, Share]
    groups: tuple[tuple[str, str, int], ...]  # (tensor group, tier, bytes)
    kv_tokens: int  # tokens of all sequences together that there is room for
    notes: tuple[str, ...] = field(default=())
    opening: int = 0  # the peak while the model is opened
    drafts: str = "none"  # the kind of drafter that there is room for
    streams: int = 1  # replies that are computed at once

    @property
    def held(self) -> int:
        """Bytes of weights that are resident."""
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
        """Bytes of the budget that are used."""
        return max(sum(self.fixed.values()) + self.held, self.opening)

    @property
    def process(self) -> int:
        """Of `planned`, what this process has: all but the reserve for the system, and the process that
        renders chat templates."""
        return self.planned - self.fixed["reserve"] - self.fixed.get(TEMPLATE, 0)

    @property
    def later(self) -> int:
        """What is planned, and only taken while answering."""
        return self.fixed["keys and values"] + self.fixed["scratch"]

    @property
    def ceiling(self) -> int:
        """Where this process has more, free memory that the allocator keeps is returned to the system."""
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
