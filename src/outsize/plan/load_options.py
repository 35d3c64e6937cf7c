"""How to open a model, and what follows from it for a plan."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from outsize import arguments
from outsize.draft import load as drafting
from outsize.draft.spec import DraftSpec, parse_draft
from outsize.encoding.find import NATIVE
from outsize.errors import BudgetError, ContextError, OptionError
from outsize.home import expanded
from outsize.kernels.backend import Backend
from outsize.kernels.plain import PLAIN
from outsize.kernels.threads import Threads, look
from outsize.model_config import Description
from outsize.pack import fetch
from outsize.pack.format import Pack
from outsize.pack.outline import Outline
from outsize.plan import beside
from outsize.plan.place import copy_bytes, place
from outsize.plan.placement import Placement
from outsize.storage.table import VERIFY
from outsize.weights.spec import parse_experts

MOSTLY = 0.9  # of a pack's bytes: then what kernels do not compute is small


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to open a model."""

    memory: str | int = "auto"
    context: int | None = None
    encoding: str = "auto"
    verify: str = "first"
    force: bool = False
    native: bool = True
    quiet: bool = False
    experts: str | None = (
        None  # None: what `outsize bench cache --write-config` chose, or the default
    )
    draft: str = "auto"
    adapters: Mapping[str, Path] = field(default_factory=dict)  # files by name
    threads: int | None = None
    # Names of these that are defaults (of the environment or config.toml): left out where they do not apply.
    defaults: Collection[str] = ()

    def kernel_threads(self, made: Pack, native: Backend) -> Threads:
        """As many as the user says, or as the machine has free."""
        looks = look if self.threads is None else (lambda: None)
        alone = native is not PLAIN and made.share_of(NATIVE) > MOSTLY
        return Threads(torch.get_num_threads(), looks, alone=alone)

    def check(self) -> None:
        self._check_kinds()
        parse_experts(self.experts or "")
        parse_draft(self.draft)
        if self.verify not in VERIFY:
            raise OptionError(f"verify is {self.verify!r}; known are {', '.join(VERIFY)}")

    def _check_kinds(self) -> None:
        """Raises OptionError."""
        if not isinstance(self.memory, str):
            arguments.whole("memory", self.memory, 1, 1 << 62)
        if self.context is not None:
            arguments.whole("context", self.context, 2, 1 << 32)
        for name in (
            "encoding",
            "verify",
            "draft",
            *(("experts",) if self.experts is not None else ()),
        ):
            arguments.word(name, getattr(self, name))
        for name in ("force", "native", "quiet"):
            arguments.flag(name, getattr(self, name))

    def of(self, model: str) -> LoadOptions:
        """What a model's name leaves of these. Raises SourceError."""
        if self.encoding != "auto" and "encoding" in self.defaults and fetch.is_pack(model):
            return replace(self, encoding="auto")
        return self

    def for_kind(self, name: str, d: Description) -> LoadOptions:
        """What a kind of model leaves of these. Raises OptionError."""
        if d.mixture is not None or self.experts is None:
            return self
        if "experts" in self.defaults:
            return replace(self, experts=None)
        raise OptionError(
            f"experts is {self.experts!r}, and {name} is a dense model, which has none; leave it out"
        )

    def smaller(self) -> Pack | None:
        """The pack of the model that drafts, if one is to."""
        spec = parse_draft(self.draft)
        return fetch.pack(spec.source, quiet=self.quiet) if spec.kind == "model" else None

    def with_all(self, outline: Outline, smaller: Outline | None, copy: Outline | None) -> Outline:
        """A model with everything that is loaded beside it. Raises AdapterError, OptionError."""
        if copy is not None:
            outline = replace(outline, copies=copy_bytes(outline, copy))
        if smaller is not None:
            beside.same_vocabulary(smaller, outline)
        paths = {name: expanded(path) for name, path in self.adapters.items()}
        return beside.with_adapters(replace(outline, smaller=smaller), paths)

    def place(self, outline: Outline, size: int, runtime: int, tokenizer: int) -> Placement:
        """The plan for a budget of `size` bytes. Raises BudgetError, ContextError."""
        longest = outline.description.context
        if self.context is not None and self.context > longest:
            raise ContextError(
                f"context is {self.context:,}; this model holds from 2 to {longest:,} tokens"
            )
        asked = parse_draft(self.draft)
        named = outline if asked.kind == "auto" else drafting.with_drafting(asked, outline)
        without = place(named, size, runtime, tokenizer, self.context, self.force)
        if asked.kind != "auto":
            return replace(without, drafts=asked.kind)
        for spec, worth in drafting.choices(outline):
            wanted = drafting.with_drafting(spec, outline)
            with suppress(BudgetError):
                made = place(wanted, size, runtime, tokenizer, self.context)
                if _pays(spec, made, without, worth):
                    return replace(made, drafts=spec.kind)
        return without


def _pays(spec: DraftSpec, made: Placement, without: Placement, worth: float) -> bool:
    """Does what drafting takes from the weights cost less than it brings?"""
    if made.context != without.context or made.streamed > worth * without.streamed:
        return False
    return spec.kind != "masks" or made.holds_head  # each guess would read the head again
