"""load(source, memory=...) -> Model: plan first, then read."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import torch

from outsize import arguments, drafting, library
from outsize.api import Model
from outsize.bars import bars
from outsize.checkpoint.tokenizer import lean
from outsize.decode.tokens import Tokens
from outsize.draft.auto import Habits
from outsize.errors import BudgetError, ContextError, OptionError
from outsize.library import warn
from outsize.model.transformer import Transformer
from outsize.native.kernels import Kernels, kernels
from outsize.options import DEFAULT_MODEL
from outsize.pack import store
from outsize.pack.format import TOKENIZER, Pack, damaged
from outsize.pack.outline import Outline, of_pack
from outsize.plan.place import copy_bytes, place, tokenizer_bytes
from outsize.plan.placement import Placement
from outsize.plan.wake import runtime_bytes
from outsize.turns import check_fork
from outsize.weights import budget
from outsize.weights import load as weights
from outsize.weights.experts import Recorder
from outsize.weights.knobs import Experts, parse
from outsize.weights.table import VERIFY
from outsize.weights.traffic import Traffic

LEAST_SHARE = 0.25  # of a tokenizer's estimated memory, that it takes in any case


@dataclass(frozen=True, slots=True)
class Wishes:
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

    def check(self) -> None:
        self._check_kinds()
        parse(self.experts or "")
        drafting.parse(self.draft)
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

    def place(self, outline: Outline, size: int, runtime: int, tokenizer: int) -> Placement:
        """The plan for a budget of `size` bytes. Raises BudgetError, ContextError."""
        longest = outline.description.context
        if self.context is not None and self.context > longest:
            raise ContextError(
                f"context is {self.context:,}; this model holds from 2 to {longest:,} tokens"
            )
        asked = drafting.parse(self.draft)
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


def _pays(spec: drafting.Spec, made: Placement, without: Placement, worth: float) -> bool:
    """Does what drafting takes from the weights cost less than it brings?"""
    if made.context != without.context or made.streamed > worth * without.streamed:
        return False
    return spec.kind != "masks" or made.holds_head  # each guess would read the head again


def load(
    model: str | PathLike[str] = DEFAULT_MODEL,
    *,
    memory: str | int = "auto",
    context: int | None = None,
    threads: int | None = None,
    encoding: str = "auto",
    verify: str = "first",
    force: bool = False,
    native: bool = True,
    quiet: bool = False,
    experts: str | None = None,
    draft: str = "auto",
    adapters: Mapping[str, str | PathLike[str]] | None = None,
    recorder: Recorder | None = None,
    before: Callable[[Outline, Placement], None] | None = None,
) -> Model:
    """Open a model: a path, hf:org/repo[:file], or package:name==version[:file]; packed first if need
    be. `memory` caps the whole process: bytes, "4GB", "75%", or "auto" (what is free, less a tenth).
    `threads` sets torch's threads for the process; `experts` says how experts are cached
    (docs/experts.md), `draft` what guesses ahead (docs/drafting.md); `adapters` are LoRA adapters, by the
    names that requests use. `recorder` is told what each layer chooses, `before` the plan before weights are
    read.
    Raises OutsizeError; BudgetError before anything is read."""
    source = library.named(model)
    check_fork(source)
    set_threads(threads)
    wishes = Wishes(memory, context, encoding, verify, force, native, quiet, experts, draft)
    wishes.check()
    files = _adapter_files(adapters)
    for name, told in (("recorder", recorder), ("before", before)):
        arguments.function(name, told)
    size, smaller = budget.parse(memory), _draft_model(wishes)
    found = library.find(source, encoding)
    if found is None and memory != "auto":
        foresee(source, wishes, size, runtime_bytes(compiled(wishes)))
    made = found or library.pack(source, encoding=encoding, quiet=quiet)
    knobs = replace(parse(experts or ""), recorder=recorder)
    copies = library.pack(source, encoding=knobs.copies, quiet=quiet) if knobs.copies else None
    model_opened = _open(made, wishes, size, knobs, before, smaller, copies)
    for name, path in files.items():
        model_opened.load_adapter(name, path)
    return model_opened


def _adapter_files(told: object) -> dict[str, Path]:
    """Raises OptionError."""
    told = {} if told is None else told
    pairs = arguments.mapping("adapters", told, "a dict of names and paths")
    return {name: arguments.path(f"adapters[{name!r}]", value) for name, value in pairs.items()}


def set_threads(threads: int | None) -> None:
    """For the process."""
    if threads is not None:
        torch.set_num_threads(arguments.whole("threads", threads, 1, 1024))


def foresee(model: str, wishes: Wishes, size: int, runtime: int) -> tuple[Outline, Placement]:
    """The plan from headers alone. Raises BudgetError."""
    outline = library.outline(model, wishes.encoding, wishes.quiet)
    if encoding := parse(wishes.experts or "").copies:
        copy = library.outline(model, encoding, wishes.quiet)
        outline = replace(outline, copies=copy_bytes(outline, copy))
    return outline, wishes.place(outline, size, runtime, tokenizer_bytes(outline))


def compiled(wishes: Wishes) -> Kernels | None:
    """The compiled kernels, if they are wished for and can be had."""
    return kernels(store.home() / "native") if wishes.native else None


def _open(
    made: Pack,
    wishes: Wishes,
    size: int,
    knobs: Experts,
    tell: Callable[[Outline, Placement], None] | None,
    smaller: Model | None = None,
    copies: Pack | None = None,
) -> Model:
    native = compiled(wishes)
    outline, before = of_pack(made), runtime_bytes(native)
    if copies is not None:
        outline = replace(outline, copies=copy_bytes(outline, of_pack(copies)))
    sure = int(LEAST_SHARE * tokenizer_bytes(outline))
    wishes.place(outline, size, before, sure)  # refuses before anything is read
    if not wishes.quiet:
        _warn_slow(made, native)
    found = tokens(made)
    budget.trim()
    placement = wishes.place(outline, size, before, max(0, budget.resident() - before))
    for note in placement.notes if not wishes.quiet else ():
        warn(note)
    if knobs.is_lossy and not wishes.quiet:
        warn(f"{knobs.lossy} changes the model's answers; leave it out for the exact ones")
    if tell is not None:
        tell(outline, placement)
    with bars(wishes.quiet) as progress:
        loaded = weights.load(
            made, native, Traffic(), progress, placement.shares, wishes.verify, knobs, copies
        )
    transformer = Transformer(made.description, loaded, native, placement.ceiling)
    return Model(
        made,
        transformer,
        found,
        placement,
        _drafting(made, wishes, placement, transformer, smaller),
    )


def _draft_model(wishes: Wishes) -> Model | None:
    """The smaller model that drafts, opened first: what it takes is then part of this process."""
    spec = drafting.parse(wishes.draft)
    if spec.kind != "model":
        return None
    return load(spec.source, draft="none", native=wishes.native, quiet=wishes.quiet)


def _drafting(
    made: Pack,
    wishes: Wishes,
    placement: Placement,
    transformer: Transformer,
    smaller: Model | None,
) -> drafting.Drafting:
    """What guesses ahead. Raises AdapterError, OptionError."""
    asked, outline = drafting.parse(wishes.draft), of_pack(made)
    if smaller is not None:
        drafting.same_vocabulary(made, smaller)
    kind = placement.drafts
    spec = asked if asked.kind == kind else drafting.Spec(kind)
    file = drafting.mask_file(spec, outline)
    masks = None if file is None else drafting.mask_model(file, spec.k, made, transformer)
    if masks is not None:
        budget.trim()  # what making it took for a moment
    return drafting.Drafting(spec if kind == "none" else asked, Habits(masks), smaller)


def _warn_slow(made: Pack, native: Kernels | None) -> None:
    grouped = [name for name in made.encodings if name.startswith("group")]
    if grouped and native is None:
        warn(
            f"{made.path.name} holds {', '.join(grouped)}, which without compiled kernels runs about "
            "20 times slower; install a C compiler, or pack again with --encoding int8"
        )


def tokens(made: Pack) -> Tokens:
    raw = (made.path / TOKENIZER).read_bytes()
    if zlib.crc32(raw) != made.tokenizer_crc:
        raise damaged(made.path, "its tokenizer does not match its checksum")
    return Tokens(lean(raw.decode()), made.bos, made.add_bos)
