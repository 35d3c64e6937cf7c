"""Makes each sequence's drafter from `--draft` and what was opened for it."""

from __future__ import annotations

from dataclasses import dataclass, field

from outsize.draft import mtp_file
from outsize.draft.auto import AutoDraft
from outsize.draft.drafter import SPARE, Company, Drafter, NoDraft
from outsize.draft.model import DraftModel, ModelDraft
from outsize.draft.mtp import MtpDraft, MtpModel
from outsize.draft.native import FurtherLayer, NativeDraft
from outsize.draft.nested import NestedDraft, NestedModel, Own
from outsize.draft.ngram import NgramDraft
from outsize.draft.spec import DraftSpec
from outsize.draft.stats import DraftStats
from outsize.draft.step_time import StepTimes
from outsize.draft.verify import Check, rejecting, verify
from outsize.errors import AdapterError
from outsize.home import expanded
from outsize.pack import fetch
from outsize.pack.format import Pack
from outsize.pack.outline import Outline
from outsize.sampling.sample import Sampler


@dataclass(slots=True)
class Drafting:
    """Makes each sequence's drafter."""

    spec: DraftSpec
    draft_stats: DraftStats = field(default_factory=DraftStats)
    model: DraftModel | None = None
    nested: NestedModel | None = None

    @property
    def mtp(self) -> MtpModel | None:
        """The model's mask tokens, if there are any."""
        return self.draft_stats.mtp

    @property
    def step_times(self) -> StepTimes | None:
        """What is to be told how long steps take, if anything asks."""
        return self.draft_stats.step_times if self.spec.kind == "auto" else None

    @property
    def spare(self) -> int:
        """Slots of keys and values behind a sequence, for what is drafted and not kept."""
        return 0 if self.spec.kind == "none" else SPARE

    def new(
        self, sampler: Sampler | None, company: Company | None = None, own: Own | None = None
    ) -> tuple[Drafter, Check]:
        """A drafter, and what checks its drafts; `company`: who shares its steps, `own`: the sequence's
        cache. Without a sampler drafts are kept where picks agree, whatever the specification says."""
        kind, k = self.spec.kind, self.spec.k
        if kind == "auto":
            return AutoDraft(self.draft_stats, company), verify
        if kind == "ngram":
            return NgramDraft(k or 4), verify
        if self.nested is not None and own is not None:
            return NestedDraft(self.nested, k or self.nested.k, own), verify
        if self.mtp is not None and kind == "mtp":
            return MtpDraft(self.mtp, k or self.mtp.k, self.spec.layout), verify
        if self.model is None:
            return NoDraft(), verify
        if kind == "native":
            return NativeDraft(FurtherLayer(self.model), k or 1), verify
        if sampler is None or self.spec.verify == "pick":
            return ModelDraft(self.model, k or 4), verify
        drafter = ModelDraft(self.model, k or 4, sampler)
        return drafter, rejecting(sampler, lambda: drafter.drawn_from)

    def restore(self) -> None:
        """After a step that an exception broke off."""
        if self.model is not None:
            self.model.transformer.memory.restore()

    def close(self) -> None:
        """A drafter of mask tokens holds the network it drafts for: a closed model keeps none of it."""
        if self.model is not None:
            self.model.close()
        self.model, self.nested, self.draft_stats = None, None, DraftStats()


def check(spec: DraftSpec, outline: Outline) -> None:
    """Raises what opening a named drafter would, from files alone."""
    if spec.kind == "model":
        fetch.outline(spec.source, quiet=True)
    if spec.kind == "mtp":
        mtp_file.check(expanded(spec.source), spec.k, outline)


def same_vocabulary(pack: Pack, smaller: Pack) -> None:
    """Raises AdapterError unless both models read the same tokens."""
    if smaller.tokenizer_crc != pack.tokenizer_crc:
        raise AdapterError(
            f"{smaller.path.name} does not read text as {pack.path.name} does; a draft model needs the "
            "same tokenizer"
        )
