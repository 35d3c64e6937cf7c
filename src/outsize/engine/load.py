"""load(source, memory=...) -> Model: plan first, then read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import NamedTuple

from typing_extensions import Unpack

from outsize import arguments
from outsize.draft import load as drafting
from outsize.draft import mtp_file
from outsize.draft.model import DraftModel
from outsize.draft.spec import DraftSpec, parse_draft
from outsize.draft.stats import DraftStats
from outsize.draft.step_time import ExpertUnion
from outsize.engine import notices, open_prefixes
from outsize.engine.model import Model
from outsize.engine.open_tokens import tokens
from outsize.engine.ranks import leader as ranks
from outsize.engine.ranks.assemble import assemble
from outsize.engine.ranks.how import settled
from outsize.engine.scheduler import Scheduler
from outsize.engine.step_lock import check_fork
from outsize.engine.threads import kernel_threads
from outsize.errors import OptionError, PackError
from outsize.home import expanded, home
from outsize.kernels.attention import CHUNK
from outsize.kernels.backend import Backend
from outsize.model.lora_file import read_adapter
from outsize.model.predictors.choose import choosers
from outsize.model.transformer import Transformer
from outsize.options import DEFAULT_MODEL, LoadChanges, LoadOptions
from outsize.pack import fetch
from outsize.pack.format import Pack
from outsize.pack.outline import Outline, of_pack
from outsize.parallel.collective import Collective
from outsize.parallel.spec import parse_parallel
from outsize.plan import chunk as chunk_plan
from outsize.plan import decide, nested, neurons, probe
from outsize.plan import make as planning
from outsize.plan.decide import compiled
from outsize.plan.layers_off import with_layers_off
from outsize.plan.nested import NestedPlan
from outsize.plan.neurons import NeuronPlan
from outsize.plan.place import tokenizer_bytes
from outsize.plan.placement import Placement
from outsize.plan.warmup import runtime_bytes
from outsize.progress import bars
from outsize.system import memory
from outsize.weights import load as weights
from outsize.weights.load import Loaded
from outsize.weights.neuron_spec import RESIDENT
from outsize.weights.open_pack import LoadPlan
from outsize.weights.spec import ExpertOptions, Recorder, parse_experts

LEAST_SHARE = 0.25  # of a tokenizer's estimated memory, that it takes in any case


def load(
    model: str | PathLike[str] = DEFAULT_MODEL,
    *,
    recorder: Recorder | None = None,
    before: Callable[[Outline, Placement], None] | None = None,
    **options: Unpack[LoadChanges],
) -> Model:
    """Open a model: a path, hf:org/repo[:file], or package:name==version[:file]; packed first if need
    be. `memory` caps the whole process: bytes, "4GB", "75%", or "auto" (what is free, less a tenth).
    `threads` sets torch's threads for the process; without it there are as many as cores, and fewer compute
    single tokens while other programs keep cores busy. `experts` says how experts are cached
    (docs/experts.md), `draft` what drafts tokens (docs/drafting.md), `prefix_cache` where prompts are kept
    for those that begin alike (docs/using.md): off, memory, or disk[:SIZE][,writes=SIZE]; `adapters` are
    LoRA adapters, by the names that requests use; `defaults` are names of these that are left out, not
    refused, where they do not apply (encoding, experts, prefix_cache). `recorder` is given what each layer's
    router chooses, `before` the plan before weights are read.
    Raises OutsizeError; BudgetError before anything is read."""
    source = fetch.named(model)
    check_fork(source)
    return open_model(source, LoadOptions().with_changes(options), recorder, before)


def open_model(
    source: str,
    options: LoadOptions,
    recorder: Recorder | None = None,
    before: Callable[[Outline, Placement], None] | None = None,
) -> Model:
    """As `load`, with the options as one object."""
    options = settled(options)
    probe.set_threads(options.threads)
    decide.check(options)
    options = decide.for_model(options, source)
    for name, given in (("recorder", recorder), ("before", before)):
        arguments.function(name, given)
    size, quiet = memory.parse(options.memory), options.quiet
    prefixes = open_prefixes.check(options)
    found = fetch.find(source, options.encoding)
    is_checked = options.ranks == 1 and (options.memory != "auto" or options.experts)
    if found is None and is_checked:
        decide.foresee(source, options, size, runtime_bytes(compiled(options)))
    made = found or fetch.pack(source, encoding=options.encoding, quiet=quiet)
    cut = nested.search(options, made)
    made = made if cut is None else cut.pack
    options = decide.for_kind(options, made.path.name, made.description)
    experts = replace(parse_experts(options.experts or ""), recorder=recorder)
    low = experts.copies
    copies = fetch.pack(source, encoding=low, quiet=quiet) if low else None
    paged = neurons.search(options, made, made.path.name)
    if made.description.shard is not None:
        raise PackError(
            f"{made.path.name} is one rank's part of a model; run {made.source.spec} with --ranks"
        )
    smaller = draft_pack(options, source)
    if options.ranks == 1:
        packs = Packs(made, smaller, copies, paged, cut)
        return _open(packs, options, Beside(size, experts, prefixes), before)
    team = assemble(made, options, compiled(options))
    try:
        packs = Packs(team.cut(home(), quiet), smaller)
        return _open(packs, options, Beside(size, experts, prefixes, team), before)
    except BaseException as e:
        team.close(e)
        raise


def draft_pack(options: LoadOptions, model: str) -> Pack | None:
    """The pack of the smaller model that drafts, if one is to, or of the model's layer that does. Raises
    OptionError."""
    spec = parse_draft(options.draft)
    if spec.kind == "native":
        if options.ranks != 1:
            raise OptionError(
                f"draft=native reads the embedding and head of a whole model, and ranks is {options.ranks}; "
                "use draft=ngram with it"
            )
        return fetch.further(model, options.encoding, quiet=options.quiet)
    return fetch.pack(spec.source, quiet=options.quiet) if spec.kind == "model" else None


class Packs(NamedTuple):
    """Of a model, of the smaller one that drafts for it, and of its experts at fewer bits; its neurons."""

    model: Pack
    smaller: Pack | None = None
    copies: Pack | None = None
    neurons: NeuronPlan | None = None  # which are computed, if they are paged
    nested: NestedPlan | None = None  # if its feed-forwards are cut into nested experts

    def outline(self, options: LoadOptions) -> Outline:
        smaller, copies = (None if p is None else of_pack(p) for p in (self.smaller, self.copies))
        own = decide.without_layers(of_pack(self.model), options)
        own = nested.with_nested(own, self.nested)
        return decide.with_all(own, options.adapters, smaller, copies)


class Beside(NamedTuple):
    """What the options say, parsed: bytes of memory, how experts are cached, where prompts are kept."""

    size: int
    experts: ExpertOptions
    prefixes: open_prefixes.Checked
    team: ranks.Team | None = None  # the other ranks


def _open(
    packs: Packs,
    options: LoadOptions,
    parsed: Beside,
    on_plan: Callable[[Outline, Placement], None] | None,
) -> Model:
    """Plan, and refuse; then read: the tokenizer, adapters, the model that drafts, and at last the weights,
    so that what reading takes for a moment is there."""
    made, native, (size, experts, kept, team) = packs.model, compiled(options), parsed
    if packs.smaller is not None:
        drafting.same_vocabulary(made, packs.smaller)
    outline, more = ranks.beside(team, packs.outline(options))
    before = runtime_bytes(native) + more
    text = tokenizer_bytes(outline)
    outline = decide.settle(outline, packs.neurons, options, size, (before, text))
    least = int(LEAST_SHARE * text)
    decide.decide(outline, options, size, before, least)  # refuses before anything is read
    if not options.quiet:
        notices.slow(made, native)
    found = tokens(made)
    memory.trim()
    placement = decide.decide(outline, options, size, before, max(0, memory.resident() - before))
    share = nested.settled(options.width, outline, placement)
    if not options.quiet:
        notices.noted(placement, options, experts, (share, nested.cost(packs.nested, share)))
    if on_plan is not None:
        on_plan(outline, placement)
    chunk = options.chunk or _chunk(options, outline, placement)
    known = {n: read_adapter(made, n, expanded(p)) for n, p in options.adapters.items()}
    memory.trim()
    ranks.plan(team, (placement.context, chunk), options, tuple(known.values()))
    with ExitStack() as opened:
        smaller = None
        if packs.smaller is not None and not packs.smaller.description.further:
            smaller = _draft_model(packs.smaller, options, placement)
            opened.callback(smaller.close)
        with bars(options.quiet) as progress:
            paged = None if outline.neurons is None else packs.neurons
            caching = nested.experts(options, experts, packs.nested, share)
            banks = neurons.banks_of(paged)
            plan = LoadPlan(placement.shares, options.verify, caching, packs.copies, banks)
            loaded = weights.load(made, native, plan, progress)
        opened.callback(loaded.close)
        if packs.smaller is not None and smaller is None:
            smaller = _draft_model(packs.smaller, options, placement, loaded)
            opened.callback(smaller.close)
        transformer = ranks.run_with(team, loaded, partial(_transformer, made, options, placement))
        transformer.chunk = chunk
        if paged is not None:
            _page(transformer, paged, native, experts.recorder)
        nested.install(transformer.nested, packs.nested, share)
        transformer.nested.is_shared = team is not None
        drafts = _drafting(made, options, placement, transformer, smaller)
        drafts.nested = nested.drafter(packs.nested, options, (outline, placement), transformer)
        opened.pop_all()
    prefixes = open_prefixes.make(kept, made, placement, transformer, known)
    whole, forward, again = ranks.steps_of(team, made)
    scheduler = Scheduler(whole.path.name, transformer, placement, drafts, forward, prefixes)
    scheduler.adapters, scheduler.again = known, again
    return Model(whole, found, scheduler, options.prefill, options.width)


def _page(
    transformer: Transformer, paged: NeuronPlan, native: Backend, recorder: Recorder | None
) -> None:
    """Compute and read only the neurons that the add-on chooses."""
    transformer.neurons = neurons.told(paged)
    made_of = choosers(paged.file, transformer.description, native)
    transformer.page_neurons(made_of, recorder, paged.spec.mode == RESIDENT)


def _transformer(
    made: Pack, options: LoadOptions, placement: Placement, loaded: Loaded, ranks: Collective | None
) -> Transformer:
    """The network over its weights."""
    whole = with_layers_off(made.description, options.layers_off, made.path.name)
    native, d = compiled(options), whole.for_context(placement.context)
    threads = kernel_threads(options, made, native)
    made_of = Transformer(d, loaded, native, placement.ceiling, threads, ranks)
    made_of.kv = options.kv
    return made_of


def _chunk(options: LoadOptions, outline: Outline, placement: Placement) -> int:
    """Tokens of a prompt that are computed at once: fewer where other replies, or other ranks, would wait for
    them."""
    if options.streams == 1:
        relayed = options.ranks > 1 and parse_parallel(options.parallel).way.cut == "layers"
        is_shared = relayed or options.prefix_cache not in (None, "off")
        return open_prefixes.SHARED_CHUNK if is_shared else CHUNK
    return chunk_plan.best(planning.cost_if_known(outline, placement))


def _draft_model(
    pack: Pack, options: LoadOptions, placement: Placement, lent: Loaded | None = None
) -> DraftModel:
    """The smaller model, fully resident: the plan has a row for it. `lent`: the model that lends it its
    embedding and head, if it has none."""
    native, outline = compiled(options), of_pack(pack)
    context = min(placement.context, outline.description.context)
    with bars(options.quiet) as progress:
        loaded = weights.load(pack, native, LoadPlan(verify=options.verify), progress, lent)
    threads = kernel_threads(options, pack, native)
    description = pack.description.for_context(context)
    transformer = Transformer(description, loaded, native, None, threads)
    return DraftModel(transformer, context, loaded.close_with(transformer))


def _drafting(
    made: Pack,
    options: LoadOptions,
    placement: Placement,
    transformer: Transformer,
    smaller: DraftModel | None,
) -> drafting.Drafting:
    """The drafter that was asked for, or that the plan chose. Raises AdapterError, OptionError."""
    asked, outline = parse_draft(options.draft), of_pack(made)
    kind = placement.drafts
    spec = asked if asked.kind == kind else DraftSpec(kind)
    file = mtp_file.find(spec, outline)
    mtp = None if file is None else mtp_file.read(file, spec.k, outline, transformer)
    if mtp is not None:
        memory.trim()  # what making it took for a moment
    mixture = made.description.mixture
    union = None if mixture is None else ExpertUnion(mixture.count, mixture.used)
    spec = spec if kind in ("none", "nested") else asked
    return drafting.Drafting(spec, DraftStats(mtp, union), smaller)
