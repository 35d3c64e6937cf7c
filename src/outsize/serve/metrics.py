"""GET /metrics: counts and times in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute

from outsize.serve.counts import Counts
from outsize.serve.host import Host
from outsize.serve.http import Call, get
from outsize.system.memory import resident

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def routes(host: Host) -> list[BaseRoute]:
    return list(get("/metrics", partial(shown, host)))


async def shown(host: Host, call: Call) -> Response:
    """Does not wake the model."""
    lines = [*_counted(host.counts), *_measured(host)]
    return PlainTextResponse("\n".join(lines) + "\n", media_type=MEDIA_TYPE)


def _counted(counts: Counts) -> Iterator[str]:
    name = "outsize_requests_total"
    yield from _head(name, "counter", "Requests that were answered, by dialect and status.")
    for (dialect, status), count in sorted(counts.requests.items()):
        yield f'{name}{{dialect="{dialect}",status="{status}"}} {count}'
    for kind, what in (("prompt", "Tokens of prompts."), ("new", "Tokens of replies.")):
        yield from _head(f"outsize_{kind}_tokens_total", "counter", what)
        yield f"outsize_{kind}_tokens_total {counts.tokens[kind]}"
    yield from _head("outsize_first_token_seconds", "histogram", "From request to first token.")
    yield from counts.first_token.lines("outsize_first_token_seconds")
    yield from _head("outsize_gap_seconds", "histogram", "Between two pieces of a reply.")
    yield from counts.gap.lines("outsize_gap_seconds")


def _measured(host: Host) -> Iterator[str]:
    """Of the model as it is now; nothing of one that is not open."""
    yield from _gauge("process_bytes", "Memory of the process.", resident())
    service = host.running
    yield from _gauge("ready", "1 where the model is open.", int(service is not None))
    if service is None:
        return
    load, counts = service.load(), service.model.counts().total
    yield from _gauge("budget_bytes", "Memory that it may take.", service.model.placement.budget)
    yield from _gauge("running", "Replies being computed.", load.running)
    yield from _gauge("waiting", "Requests that wait.", load.waiting)
    yield from _gauge("kv_tokens", "Tokens whose keys and values are stored.", load.kv_tokens)
    yield from _gauge("kv_room", "Tokens for which there is room.", load.kv_room)
    yield from _gauge("hit_rate", "Share of records that were not read.", round(counts.hit_rate, 6))
    totals = service.totals
    for name, what, value in (
        ("cached_tokens", "Tokens of prompts that were not computed again.", totals.cached_tokens),
        ("drafted_tokens", "Draft tokens that were checked.", totals.drafted),
        ("accepted_tokens", "Draft tokens that were right.", totals.accepted),
        ("cancelled", "Replies that were broken off.", totals.cancelled),
    ):
        yield from _head(f"outsize_{name}_total", "counter", what)
        yield f"outsize_{name}_total {value}"
    yield from _head("outsize_bytes_read_total", "counter", "Bytes of weights read from disk.")
    yield f"outsize_bytes_read_total {counts.bytes_read}"


def _head(name: str, kind: str, what: str) -> Iterator[str]:
    yield f"# HELP {name} {what}"
    yield f"# TYPE {name} {kind}"


def _gauge(name: str, what: str, value: float) -> Iterator[str]:
    yield from _head(f"outsize_{name}", "gauge", what)
    yield f"outsize_{name} {value}"
