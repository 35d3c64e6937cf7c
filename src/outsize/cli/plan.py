"""`outsize plan`: what will be where, how fast it will be, and what more memory would buy."""

from __future__ import annotations

import json
from pathlib import Path

from outsize.errors import BudgetError
from outsize.log import say
from outsize.options import LoadOptions
from outsize.plan.make import make
from outsize.report import plan_text
from outsize.report.plan_page import page


def show(
    model: str,
    options: LoadOptions,
    prompt: int | None,
    as_json: bool,
    html: Path | None,
    trace: Path | None = None,
) -> None:
    """Print the plan; write the page."""
    try:
        made = make(model, options, prompt, trace)
    except BudgetError as e:
        if not as_json:
            raise
        print(json.dumps({"error": str(e)}))
        raise
    if html is not None:
        html.write_text(page(made.to_json()), encoding="utf-8")
        say(f"wrote {html}")
    if as_json:
        print(json.dumps(made.to_json()))
        return
    print(
        "\n".join(plan_text.long(made.outline, made.placement, made.cost, made.machine, made.curve))
    )
