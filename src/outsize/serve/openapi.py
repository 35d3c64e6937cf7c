"""GET /openapi.json: every route with its body's schema, made from the routes themselves."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from outsize.serve.http import Call, Endpoint, get
from outsize.version import __version__

REFERENCE = "#/components/schemas/{model}"
STATUSES = (400, 401, 403, 404, 408, 413, 415, 429, 500, 501, 503)
OBJECT = {"application/json": {"schema": {"type": "object"}}}
ERROR = {"description": "An error, in the dialect's shape.", "content": OBJECT}
KINDS = ("application/json", "text/event-stream", "application/x-ndjson", "text/plain", "text/html")


def routes(of: Iterable[BaseRoute]) -> list[BaseRoute]:
    """Describes these routes."""
    found = [route for route in of if isinstance(route, Route)]
    return list(get("/openapi.json", partial(shown, found)))


async def shown(found: list[Route], call: Call) -> Response:
    return JSONResponse(described(found))


def described(found: Iterable[Route]) -> dict[str, Any]:
    """The description of some routes."""
    paths: dict[str, Any] = {}
    schemas: dict[str, Any] = {}
    for route in found:
        path = re.sub(r":\w+}", "}", route.path)
        for method in sorted((route.methods or set()) - {"HEAD"}):
            paths.setdefault(path, {})[method.lower()] = _operation(route, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "outsize", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _operation(route: Route, schemas: dict[str, Any]) -> dict[str, Any]:
    fine = {"description": "The answer.", "content": {kind: {"schema": {}} for kind in KINDS}}
    answers = {"200": fine, **{str(status): ERROR for status in STATUSES}}
    made: dict[str, Any] = {"responses": answers}
    names = re.findall(r"{(\w+)", route.path)
    if names:
        text = {"type": "string"}
        made["parameters"] = [
            {"name": n, "in": "path", "required": True, "schema": text} for n in names
        ]
    kind = route.endpoint.kind if isinstance(route.endpoint, Endpoint) else None
    if kind is not None:
        reference = {"$ref": REFERENCE.format(model=_add(kind, schemas))}
        content = {"application/json": {"schema": reference}}
        made["requestBody"] = {"required": True, "content": content}
    return made


def _add(kind: type[BaseModel], schemas: dict[str, Any]) -> str:
    """A body's schema and those of its parts; fields that are not known are refused."""
    made = kind.model_json_schema(ref_template=REFERENCE)
    parts = made.pop("$defs", {}) | {kind.__name__: made}
    for name, part in parts.items():
        if part.get("type") == "object" and "properties" in part:
            part["additionalProperties"] = False
        schemas[name] = part
    return kind.__name__
