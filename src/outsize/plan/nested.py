"""Nested experts in a plan: which pack has them, what its add-on says, which pieces are worth their memory,
and what `--width auto` turns out to be.

A piece's worth is how often a token uses it, by what was measured when the add-on was made: all are equally
long, so slots go to those that save most bytes a token, whichever layer they are of.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from outsize.draft.nested import NestedModel
from outsize.draft.spec import parse_draft
from outsize.errors import OptionError
from outsize.home import home
from outsize.model.transformer import Transformer
from outsize.model.width import (
    AUTO,
    NOT_MEASURED,
    Correction,
    LayerRouter,
    Nested,
    Point,
    parse_width,
)
from outsize.options import LoadOptions
from outsize.pack import nested_file, store
from outsize.pack.format import Pack
from outsize.pack.kinds.layers import GOLDEN
from outsize.pack.nested_file import BIAS, ROUTER, A, B, C, NestedFile
from outsize.pack.outline import FamilyRow, NestedFamily, Outline
from outsize.plan.nested_cost import AUTO_READS, drafting, reads
from outsize.plan.placement import Placement
from outsize.weights.spec import PROFILED, ExpertOptions

AUTO_LOSS = 1.10  # times the whole model's perplexity, at most, of what `auto` may choose


@dataclass(frozen=True, slots=True)
class NestedPlan:
    """What was found for a pack of nested experts."""

    pack: Pack
    file: NestedFile | None


def wants(options: LoadOptions) -> str:
    """The option that only nested experts have, as it was given; "" for none. Raises OptionError."""
    if parse_width(options.width) != 1.0:
        return f"width is {options.width!r}"
    return f"draft is {options.draft!r}" if parse_draft(options.draft).kind == "nested" else ""


def search(options: LoadOptions, pack: Pack) -> NestedPlan | None:
    """The pack itself, or the one that was cut out of it, where an option asks for that. Raises OptionError,
    AdapterError."""
    asked = wants(options)
    if not pack.description.is_nested:
        if not asked:
            return None
        folder, exact = home() / "packs", parse_width(options.width) == 1.0
        made = store.nested_of(folder, pack, exact)
        tuned = store.nested_of(folder, pack) if made is None else None
        if tuned is not None:
            raise OptionError(
                f"{asked}, which changes no answer, and nested experts of {pack.path.name} were tuned: all "
                f"of them are another model; name {tuned.path.name}, or make others without --tune"
            )
        if made is None and pack.description.mixture is not None:
            raise OptionError(
                f"{asked}, and {pack.path.name} is a mixture of experts, of which no nested ones are made; "
                "leave it out"
            )
        if made is None:
            raise OptionError(
                f"{asked}, and {pack.path.name} is not cut into nested experts; `outsize adapt nested "
                f"{pack.path.name} --data FILE` does that, or leave it out"
            )
        pack = made
    return NestedPlan(pack, nested_file.of_pack(pack))


def experts(
    options: LoadOptions, given: ExpertOptions, found: NestedPlan | None, share: float
) -> ExpertOptions:
    """How pieces are cached, where the user says nothing: those used most stay, the others are read ahead by
    the next layer's router."""
    if found is None or options.experts is not None:
        return given
    count = _count(found.pack)
    ahead = f"top:{count}"
    return replace(given, eviction=PROFILED, prefetch=ahead, ranked=ranked(found, share))


def ranked(found: NestedPlan, share: float) -> tuple[int, ...]:
    """The keys of all pieces, the most worth first: by how often they are used; of equals the narrowest,
    spread over the layers."""
    layers, count = found.pack.description.num_layers, _count(found.pack)
    use_LN = use_of(found.file, share)
    if use_LN is None:
        use_LN = torch.ones(layers, count, dtype=torch.float32, device="cpu")
    use = use_LN.flatten().tolist()
    spread = sorted(range(layers), key=lambda i: i * GOLDEN % 1)
    order = {layer: at for at, layer in enumerate(spread)}
    keys = range(layers * count)
    return tuple(sorted(keys, key=lambda k: (-use[k], k % count, order[k // count])))


def use_of(file: NestedFile | None, share: float) -> Tensor | None:
    """(L, N) how often a token uses each piece at a share of the feed-forwards, as measured; None: always, or
    not measured."""
    if file is None or share >= 1:
        return None
    at = min(range(len(file.about.family)), key=lambda i: abs(file.about.family[i].share - share))
    return file.uses()[at]


def _count(pack: Pack) -> int:
    assert pack.description.mixture is not None
    return pack.description.mixture.count


def install(nested: Nested, found: NestedPlan | None, auto: float) -> None:
    """Give a network what an add-on has. Raises AdapterError."""
    nested.auto = auto
    if found is None or found.file is None:
        return
    about, file = found.file.about, found.file
    router_LMD, bias_LM = file.numbers(ROUTER), file.numbers(BIAS)
    fixes = _corrections(file) if about.rank else [()] * len(router_LMD)
    nested.routers = [
        LayerRouter(w.contiguous(), b, about.widths, fix)
        for w, b, fix in zip(router_LMD, bias_LM, fixes, strict=True)
    ]
    nested.cost = about.cost
    nested.points = [Point(m.threshold, m.share) for m in about.family]


def _corrections(file: NestedFile) -> list[tuple[Correction, ...]]:
    """By layer, of each width but the last."""
    a, b, c = (file.numbers(name) for name in (A, B, C))
    return [
        tuple(Correction(*each) for each in zip(*parts, strict=True))
        for parts in zip(a, b, c, strict=True)
    ]


def with_nested(o: Outline, found: NestedPlan | None) -> Outline:
    """The outline with the family of its widths."""
    if found is None or found.file is None:
        return o
    file, about = found.file, found.file.about
    total = sum(t.size for t in o.tables if t.kind == "experts")
    use = file.uses()
    rows = [
        FamilyRow(m.share, m.perplexity, m.kl, m.agrees, _curve(use[i]))
        for i, m in enumerate(about.family)
    ]
    whole = torch.ones(o.description.num_layers, about.count, dtype=torch.float32, device="cpu")
    rows.append(FamilyRow(1.0, about.perplexity, 0.0, 1.0, _curve(whole)))
    return replace(o, nested=NestedFamily(file.size, total, tuple(rows)))


def _curve(use_LN: Tensor) -> tuple[float, ...]:
    """Share of a token's uses that the most used pieces have, by so many of them."""
    often, _ = torch.sort(use_LN.flatten(), descending=True)
    return tuple((often.cumsum(0) / often.sum().clamp_min(1e-9)).tolist())


def settled(width: str | float, o: Outline, p: Placement) -> float:
    """The share that a width means: `auto` is the widest for whose pieces memory is enough and that loses
    little; all, where there is none."""
    asked = parse_width(width)
    if asked != AUTO:
        return float(asked)
    rows = () if o.nested is None else o.nested.rows
    for row in reversed(rows):
        loss = row.perplexity / rows[-1].perplexity
        if reads(o, p, row) <= AUTO_READS * o.size and loss <= AUTO_LOSS:
            return row.share
    return 1.0


def cost(found: NestedPlan | None, share: float) -> str:
    """What a share costs, in words."""
    return NOT_MEASURED if found is None or found.file is None else found.file.about.cost(share)


def drafter(
    found: NestedPlan | None,
    options: LoadOptions,
    planned: tuple[Outline, Placement],
    transformer: Transformer,
) -> NestedModel | None:
    """The network as its own drafter, at the share and with the number of tokens that `--draft
    nested[:WIDTH]` means, if that was asked for, or chosen."""
    if found is None or planned[1].drafts != "nested":
        return None
    spec, best = parse_draft(options.draft), drafting(*planned)
    share = float(spec.source) if spec.source else best.share or 1 / _count(found.pack)
    return NestedModel(transformer, share, spec.k or best.k)
