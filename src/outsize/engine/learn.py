"""A reply corrects what is kept of this machine: rates that a run reached can be reached."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from outsize.engine.model import Model
from outsize.engine.reply import Reply
from outsize.home import home
from outsize.options import LoadOptions
from outsize.pack.outline import of_pack
from outsize.plan import cost, machine
from outsize.plan.decide import compiled


def learn(model: Model, reply: Reply) -> None:
    """Let a reply correct what is kept of this machine: what a run reached can be reached."""
    folder = home()
    here = machine.kept(folder)
    if here is None or model.transformer.leader is not None:  # what several ranks reach is theirs
        return
    outline, new = of_pack(model.pack), here
    key = cost.key(outline) + ("" if compiled(LoadOptions()) else "-plain")
    bandwidth, is_plain = 0.0, not model.placement.streamed and not model.given_up
    if is_plain and not reply.drafted and reply.step_s > 0 and outline.description.mixture is None:
        read = outline.size - (0 if outline.description.tied else outline.table("embed").size)
        bandwidth = read / reply.step_s
        if key in here.models:
            faster = here.models[key].at_most(cost.step_s(outline, here.models[key]), reply.step_s)
            new = replace(new, models=here.models | {key: faster})
    new = new.achieved(reply.disk_bytes_per_s, bandwidth)
    if new != here:
        with suppress(OSError):
            machine.keep(new, folder)
