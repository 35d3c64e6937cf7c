"""GET /v1/models and /v1/models/{id}: the model, its aliases and its adapters, as OpenAI lists them, or as
Anthropic does, where `anthropic-version` is sent."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial

from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute

from outsize.serve.errors import ANTHROPIC
from outsize.serve.host import Host
from outsize.serve.http import Call, get


def routes(host: Host) -> list[BaseRoute]:
    return [
        *get("/v1/models", partial(listed, host), "/models"),
        *get("/v1/models/{name:path}", partial(one, host), "/models/{name:path}"),
    ]


async def listed(host: Host, call: Call) -> Response:
    names = host.names()
    described = [_described(host, name, call.dialect) for name in names]
    if call.dialect == ANTHROPIC:
        ends = {"first_id": names[0], "last_id": names[-1], "has_more": False}
        return JSONResponse({"data": described, **ends})
    return JSONResponse({"object": "list", "data": described})


async def one(host: Host, call: Call) -> Response:
    """Raises ApiError for a name that is not known."""
    name = host.named(call.request.path_params["name"]).name
    return JSONResponse(_described(host, name, call.dialect))


def _described(host: Host, name: str, dialect: str) -> dict[str, object]:
    if dialect == ANTHROPIC:
        created = datetime.fromtimestamp(host.created, UTC).isoformat().replace("+00:00", "Z")
        limits = {"max_input_tokens": host.context, "max_tokens": host.context}
        told = {"display_name": name, "created_at": created, "lifecycle": "active"}
        return {"type": "model", "id": name, **told, **limits}
    longest = {} if host.context is None else {"max_model_len": host.context}
    owner = {"object": "model", "created": host.created, "owned_by": "outsize"}
    root = {"root": host.name, "parent": host.name if name in host.adapters else None}
    return {"id": name, **owner, **root, **longest}
