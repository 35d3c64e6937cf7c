"""GET /health: whether the model can be asked, and if not yet, how far it is."""

from __future__ import annotations

from functools import partial

from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute

from outsize.serve import host as states
from outsize.serve.errors import ApiError
from outsize.serve.host import Host
from outsize.serve.http import Call, get, refusal


def routes(host: Host) -> list[BaseRoute]:
    return [*get("/health", partial(health, host))]


async def health(host: Host, call: Call) -> Response:
    """200 where a request would be answered (a model that was closed for want of requests is opened for it),
    else 503. Does not wake the model."""
    if host.state in (states.READY, states.UNLOADED):
        return JSONResponse({"status": "ok", "model": host.name, "state": host.state})
    if host.state == states.LOADING:
        said = f"the model is being opened: {host.work}, {100 * host.progress:.0f} %"
        error = ApiError(status=503, message=said, retry_after_s=1.0, progress=host.progress)
    elif host.state == states.FAILED:
        said = f"the model cannot be opened: {host.reason}"
        error = ApiError(status=503, message=said, retry_after_s=10.0)
    else:
        error = ApiError(status=503, message="the server ends", retry_after_s=5.0)
    return refusal(call, error)
