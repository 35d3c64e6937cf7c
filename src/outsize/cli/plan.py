"""`outsize plan`: what will be where, how fast it will be, and what more memory would buy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from outsize.cli.command import only, with_flags, without
from outsize.cli.flags import DisplayOptions, Flag
from outsize.errors import BudgetError, OptionError
from outsize.log import say
from outsize.options import DEFAULT_MODEL, LoadOptions


@dataclass(frozen=True, slots=True)
class PlanFlags:
    """What a plan is for."""

    prompt_tokens: Annotated[
        int | None, Flag("--prompt-tokens", "Predict the first token after so many (512).")
    ] = None
    html: Annotated[Path | None, Flag("--html", "Write a page with the curve.")] = None
    what_if: Annotated[
        str | None,
        Flag(
            "--what-if", "Compare with bits=3.5,width=.5,rank=8,kv=int8,share-kv=11 (any of them)."
        ),
    ] = None
    trace: Annotated[
        Path | None, Flag("--trace", "Expect of experts what this recording tells.")
    ] = None
    link: Annotated[
        str | None,
        Flag("--link", "With --ranks: what lies between them, as 100Mbit/s or 1Gbit/s,0.2ms."),
    ] = None


@with_flags
def plan(
    load: Annotated[LoadOptions, without("verify", "chunk", "prefill", "listen")],
    own: PlanFlags,
    display: Annotated[DisplayOptions, only("json")],
    model: Annotated[str, typer.Argument()] = DEFAULT_MODEL,
) -> None:
    """What will be where and how fast it will be, from headers alone: before any download."""
    from outsize.plan.make import make
    from outsize.report import plan_page, plan_text

    if own.what_if is not None:
        _what_if(model, load, own, display.json)
        return
    if load.ranks > 1:
        _of_ranks(model, load, own, display.json)
        return
    if own.link is not None:
        raise OptionError(
            "--link lies between ranks, and there is one; add --ranks, or leave it out"
        )
    try:
        made = make(model, load, own.prompt_tokens, own.trace)
    except BudgetError as e:
        if display.json:
            print(json.dumps({"error": str(e)}))
        raise
    if own.html is not None:
        own.html.write_text(plan_page.page(made.to_json()), encoding="utf-8")
        say(f"wrote {own.html}")
    print(json.dumps(made.to_json()) if display.json else "\n".join(plan_text.long(made)))


def _what_if(model: str, load: LoadOptions, own: PlanFlags, as_json: bool) -> None:
    """A model now and as it would be."""
    from outsize.plan.compare import compare
    from outsize.report import whatif_page, whatif_text

    if own.trace is not None:
        raise OptionError(
            "--trace tells of experts, which --what-if leaves as they are; leave it out"
        )
    if load.ranks > 1 or own.link is not None:
        raise OptionError("--what-if is of one process; leave --ranks and --link out")
    made = compare(model, load, own.what_if or "", own.prompt_tokens)
    if own.html is not None:
        own.html.write_text(whatif_page.page(made), encoding="utf-8")
        say(f"wrote {own.html}")
    print(json.dumps(made.to_json()) if as_json else "\n".join(whatif_text.lines(made)))


def _of_ranks(model: str, load: LoadOptions, own: PlanFlags, as_json: bool) -> None:
    from outsize.engine.ranks.how import settled
    from outsize.parallel.slow import parse_link
    from outsize.plan import ranks
    from outsize.report import ranks_text

    for name in ("prompt_tokens", "html", "trace"):
        if getattr(own, name) is not None:
            flag = name.replace("_", "-")
            raise OptionError(f"--{flag} is for one rank; leave it out, or --ranks")
    link = parse_link(own.link or ranks.LOOPBACK)
    made = ranks.make(model, settled(load) if own.link is None else load, link)
    print(json.dumps(made.to_json()) if as_json else "\n".join(ranks_text.long(made)))
