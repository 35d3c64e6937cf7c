"""`outsize doctor`: this machine, measured."""

from __future__ import annotations

import json
from typing import Annotated

from outsize.cli.command import only, with_flags
from outsize.cli.flags import DisplayOptions


@with_flags
def doctor(display: Annotated[DisplayOptions, only("json")]) -> None:
    """What this machine is, what it can do, and what would run slowly here and why."""
    from outsize.report.doctor import complaints, examine, lines

    seen = examine()
    if display.json:
        print(json.dumps(seen | {"complaints": complaints(seen)}))
    else:
        print("\n".join(lines(seen)))
