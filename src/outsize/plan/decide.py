"""From load options to a placement, from headers alone: what will be in memory, and what drafts."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from outsize.draft import load as drafters
from outsize.draft.spec import DraftSpec, parse_draft
from outsize.errors import BudgetError, ContextError, OptionError
from outsize.forward.prune import parse_prefill
from outsize.home import expanded
from outsize.kernels.backend import Backend
from outsize.kernels.find import find
from outsize.log import silent, warn_once
from outsize.model.width import parse_width
from outsize.model_config import Description
from outsize.options import LoadOptions
from outsize.pack import fetch
from outsize.pack.outline import Outline, of_pack
from outsize.plan import beside, drafts, fixed, nested, neurons
from outsize.plan.layers_off import parse_layers, with_layers_off
from outsize.plan.nested_cost import WORTH, drafting
from outsize.plan.neurons import NeuronPlan
from outsize.plan.place import copy_bytes, place, tokenizer_bytes
from outsize.plan.placement import Placement
from outsize.prefix.spec import parse_prefix
from outsize.storage.table import VERIFY
from outsize.weights.neuron_spec import OFF, parse_neurons
from outsize.weights.spec import parse_experts


def check(options: LoadOptions) -> None:
    """Parse the options that are texts. Raises OptionError, UnsupportedError."""
    parse_experts(options.experts or "")
    parse_neurons(options.neurons)
    parse_width(options.width)
    parse_layers(options.layers_off)
    draft, prune = parse_draft(options.draft), parse_prefill(options.prefill)
    if prune is not None:
        prune.check_drafts(draft.kind)
    if options.verify not in VERIFY:
        raise OptionError(f"verify is {options.verify!r}; known are {', '.join(VERIFY)}")


def compiled(options: LoadOptions) -> Backend:
    """The backend: compiled, if that is asked for and can be built; a warning says once why not."""
    report = silent if options.quiet else warn_once
    return find(options.native, report)


def for_model(options: LoadOptions, model: str) -> LoadOptions:
    """The options for a model's name: a default encoding is left out where it names a pack, whose encoding is
    decided. Raises SourceError."""
    if options.encoding != "auto" and "encoding" in options.defaults and fetch.is_pack(model):
        return replace(options, encoding="auto")
    return options


def for_kind(options: LoadOptions, name: str, d: Description) -> LoadOptions:
    """The options for a model: default cache settings are left out where they do not apply. Raises
    OptionError where they are no defaults."""
    options = _for_states(options, name, d)
    lossy = parse_experts(options.experts or "").lossy if d.is_nested else ""
    if lossy and "experts" not in options.defaults:
        raise OptionError(
            f"experts has {lossy}, and a token of {name} uses the first pieces of a feed-forward, in place "
            "of which there are no others; leave it out"
        )
    if (d.mixture is not None and not lossy) or options.experts is None:
        return options
    if "experts" in options.defaults:
        return replace(options, experts=None)
    raise OptionError(
        f"experts is {options.experts!r}, and {name} is a dense model, which has none; leave it out"
    )


def _for_states(options: LoadOptions, name: str, d: Description) -> LoadOptions:
    """Raises OptionError for what a model that keeps states of sequences cannot have."""
    if not (d.has_states or not d.is_even):
        return options
    if options.prefix_cache in (None, "off"):
        return options
    if "prefix_cache" in options.defaults:
        return replace(options, prefix_cache=None)
    if not d.has_states:
        raise OptionError(
            f"prefix_cache is {options.prefix_cache!r}, and layers of {name} keep keys and values of several "
            "sizes, which the cache's blocks do not hold; leave it out"
        )
    raise OptionError(
        f"prefix_cache is {options.prefix_cache!r}, and layers of {name} keep a state of the whole sequence, "
        "of which no part is another prompt's; leave it out"
    )


def foresee(model: str, options: LoadOptions, size: int, runtime: int) -> tuple[Outline, Placement]:
    """The outline of a model's pack, made or not, and its placement for a budget of `size` bytes, of which
    the interpreter and libraries take `runtime`. Raises BudgetError."""
    options = for_model(options, model)
    outline = fetch.outline(model, options.encoding, options.quiet)
    packed = fetch.find(model, options.encoding)
    cut = None if packed is None else nested.search(options, packed)
    if packed is None and (asked := nested.wants(options)):
        raise OptionError(
            f"{asked}, and {outline.name} is not packed here, nor cut into nested experts; `outsize adapt "
            "nested` does both, or leave it out"
        )
    outline = outline if cut is None else nested.with_nested(of_pack(cut.pack), cut)
    options = for_kind(options, outline.name, outline.description)
    outline = without_layers(outline, options)
    draft, encoding = parse_draft(options.draft), parse_experts(options.experts or "").copies
    drafters.check(draft, outline)
    smaller = fetch.outline(draft.source, "auto", options.quiet) if draft.kind == "model" else None
    if draft.kind == "native":
        smaller = fetch.further_outline(model, options.encoding, options.quiet)
    copy = fetch.outline(model, encoding, options.quiet) if encoding else None
    outline = with_all(outline, options.adapters, smaller, copy)
    made = None if options.neurons == OFF else fetch.find(model, options.encoding)
    paged = neurons.search(options, made, outline.name)
    tokenizer = tokenizer_bytes(outline)
    outline = settle(outline, paged, options, size, (runtime, tokenizer))
    return outline, decide(outline, options, size, runtime, tokenizer)


def without_layers(o: Outline, options: LoadOptions) -> Outline:
    """The outline of a run that leaves some layers' memories out; and what cannot be with such layers is
    refused. Raises OptionError."""
    d = with_layers_off(o.description, options.layers_off, o.name)
    check_prefill(d, options.prefill)
    return replace(o, description=d)


def check_prefill(d: Description, prefill: str) -> None:
    """Raise OptionError for a model whose layers need all tokens, where tokens are to skip layers."""
    if parse_prefill(prefill) is None:
        return
    if d.has_states:
        raise OptionError(
            f"prefill is {prefill!r}, and layers of {d.family} models keep a state that all tokens must go "
            "through; use prefill=full"
        )
    if d.reads_tokens:
        raise OptionError(
            f"prefill is {prefill!r}, and layers of {d.family} models read their tokens' embeddings or rows, "
            "which skipped tokens would have to keep; use prefill=full"
        )


def settle(
    outline: Outline,
    paged: NeuronPlan | None,
    options: LoadOptions,
    size: int,
    sizes: tuple[int, int],
) -> Outline:
    """The outline with its neurons paged, if they are to be. `sizes`: of runtime and tokenizer. Raises
    BudgetError."""
    return neurons.settle(outline, paged, lambda o: decide(o, options, size, *sizes))


def with_all(
    outline: Outline, adapters: Mapping[str, Path], smaller: Outline | None, copy: Outline | None
) -> Outline:
    """The outline with what is loaded beside the model: adapters, a `smaller` model that drafts, a `copy` of
    its experts at fewer bits. Raises AdapterError, OptionError."""
    if copy is not None:
        outline = replace(outline, copies=copy_bytes(outline, copy))
    if smaller is not None:
        beside.same_vocabulary(smaller, outline)
    paths = {name: expanded(path) for name, path in adapters.items()}
    return beside.with_adapters(replace(outline, smaller=smaller), paths)


def decide(
    outline: Outline, options: LoadOptions, size: int, runtime: int, tokenizer: int
) -> Placement:
    """The placement for a budget of `size` bytes; with `--draft auto` also the kind of drafter: the best that
    brings more than its memory takes from weights. Raises BudgetError, ContextError."""
    grammars = options.streams if options.grammars else 0
    outline = replace(
        outline, streams=options.streams, grammars=grammars, kv=options.kv,
        pins_pieces=outline.description.is_nested and options.experts is None,
    )  # fmt: skip
    if parse_prefix(options.prefix_cache).kind == "disk":
        outline = replace(outline, staging=fixed.staging(outline, options.chunk))
    longest, context = outline.description.context, options.context
    if context is not None and context > longest:
        raise ContextError(f"context is {context:,}; this model holds from 2 to {longest:,} tokens")
    asked = parse_draft(options.draft)
    named = outline if asked.kind == "auto" else drafts.with_drafting(asked, outline)
    without = place(named, size, runtime, tokenizer, context, options.force)
    if asked.kind != "auto":
        return replace(without, drafts=asked.kind)
    if drafting(named, without).gain >= WORTH:
        return replace(without, drafts="nested")
    for spec, worth in drafts.choices(outline):
        wanted = drafts.with_drafting(spec, outline)
        with suppress(BudgetError):
            made = place(wanted, size, runtime, tokenizer, context)
            if _pays(spec, made, without, worth):
                return replace(made, drafts=spec.kind)
    return without


def _pays(spec: DraftSpec, made: Placement, without: Placement, worth: float) -> bool:
    """Does what drafting takes from the weights cost less than it brings?"""
    if made.context != without.context or made.streamed > worth * without.streamed:
        return False
    return spec.kind != "mtp" or made.holds_head  # each draft token would read the head again
