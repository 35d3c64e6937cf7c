"""Memory of what is loaded beside a model, from headers alone: LoRA adapters, a smaller model that drafts.
Also whether one more adapter fits once a model is open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from outsize.checkpoint import lora as adapters
from outsize.errors import AdapterError, BudgetError, UnsupportedError
from outsize.model.lora import MAKING, check_shapes, stack_bytes
from outsize.model.lora_file import MTP
from outsize.model_config import Description
from outsize.pack.format import Pack
from outsize.pack.outline import Outline, of_pack
from outsize.plan.fixed import token_bytes
from outsize.plan.placement import ADAPTER, Placement

ROUNDING = 8 << 10  # bytes that an allocator loses for a stack's tensors


def adapter_bytes(name: str, path: Path, d: Description, model: str) -> tuple[int, int]:
    """Bytes of a LoRA adapter: resident, and the peak while it is read. Raises AdapterError,
    UnsupportedError."""
    if d.mixture is not None:
        raise UnsupportedError(f"{path}: adapters are for dense models; {model} has experts")
    if not d.whole.is_usual:
        raise UnsupportedError(f"{path}: adapters of {d.family} models are not known")
    file = adapters.load(path)
    if file.about.get("kind") == MTP:
        raise AdapterError(
            f"{path} is a mask-token drafter (mtp), which drafts and does not change answers; use it with "
            f"--draft mtp:{path}"
        )
    factors = adapters.Factors(file, d.head_dim)
    check_shapes(name, d, factors.shapes)
    stacks = stack_bytes(d, factors.shapes)
    return sum(stacks) + ROUNDING * len(stacks), MAKING * max(stacks)


def with_adapters(o: Outline, paths: Mapping[str, Path]) -> Outline:
    """The outline with the bytes of these adapters. Raises AdapterError, UnsupportedError."""
    found = {name: adapter_bytes(name, p, o.description, o.name) for name, p in paths.items()}
    making = max((most for _, most in found.values()), default=0)
    return replace(o, adapters={name: size for name, (size, _) in found.items()}, making=making)


def same_vocabulary(smaller: Outline, model: Outline) -> None:
    """Raise AdapterError unless a draft model has as many tokens as the model. Of packs, the tokenizers are
    compared, too (draft/load.py)."""
    ours, theirs = model.description.vocab_size, smaller.description.vocab_size
    if ours != theirs:
        raise AdapterError(
            f"{smaller.name} has {theirs:,} tokens, {model.name} {ours:,}; a draft model needs the same "
            "tokenizer"
        )


def missing(p: Placement, size: int, given_up: int) -> int:
    """Bytes of weights to drop before `size` more may be loaded; `given_up`: those dropped before."""
    return max(0, p.planned + size - given_up - p.budget)


def refusal(name: str, p: Placement, size: int, short: int, giveable: int) -> BudgetError:
    """The error for an adapter that there is no room for, in bytes: its size, what is missing, and what
    dropping weights could free."""
    mb = 1e6
    return BudgetError(
        f"adapter {name} takes {size / mb:,.1f} MB, and of the budget of {p.budget / mb:,.0f} MB "
        f"{max(0, size - short) / mb:,.1f} MB are free and weights of {giveable / mb:,.1f} MB could be given "
        "up for it; load the model with more --memory"
    )


def with_sizes(p: Placement, sizes: Mapping[str, int], pack: Pack) -> Placement:
    """The placement with these adapters and no others: bytes by name, taken from keys and values of
    batches."""
    before = sum(size for name, size in p.fixed.items() if name.startswith(ADAPTER))
    fixed = {name: size for name, size in p.fixed.items() if not name.startswith(ADAPTER)}
    fixed |= {ADAPTER + name: size for name, size in sizes.items()}
    more = sum(sizes.values()) - before
    tokens = min(p.kv_tokens, max(p.context, p.kv_tokens - more // token_bytes(of_pack(pack))))
    return replace(p, fixed=fixed, kv_tokens=tokens)
