"""GET /openapi.json: every route with its body's schema, made from the routes themselves."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from outsize.serve.http import Call, Endpoint, get
from outsize.version import __version__

REFERENCE = "#/components/schemas/{model}"
STATUSES = (400, 401, 403, 404, 408, 413, 415, 429, 500, 501, 503)
OBJECT = {"application/json": {"schema": {"type": "object"}}}
ERROR = {"description": "An error, in the dialect's shape.", "content": OBJECT}
Bodies = dict[type[BaseModel], dict[str, Any]]  # references to schemas
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
    listed = list(found)
    bodies, schemas = _schemas({kind for route in listed if (kind := _kind(route)) is not None})
    for route in listed:
        path = re.sub(r":\w+}", "}", route.path)
        for method in sorted((route.methods or set()) - {"HEAD"}):
            paths.setdefault(path, {})[method.lower()] = _operation(route, bodies)
    return {
        "openapi": "3.1.0",
        "info": {"title": "outsize", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _kind(route: Route) -> type[BaseModel] | None:
    return route.endpoint.kind if isinstance(route.endpoint, Endpoint) else None


def _operation(route: Route, bodies: Bodies) -> dict[str, Any]:
    fine = {"description": "The answer.", "content": {kind: {"schema": {}} for kind in KINDS}}
    answers = {"200": fine, **{str(status): ERROR for status in STATUSES}}
    made: dict[str, Any] = {"responses": answers}
    names = re.findall(r"{(\w+)", route.path)
    if names:
        text = {"type": "string"}
        made["parameters"] = [
            {"name": n, "in": "path", "required": True, "schema": text} for n in names
        ]
    if (kind := _kind(route)) is not None:
        content = {"application/json": {"schema": bodies[kind]}}
        made["requestBody"] = {"required": True, "content": content}
    return made


def _schemas(kinds: Iterable[type[BaseModel]]) -> tuple[Bodies, dict[str, Any]]:
    """References to bodies' schemas, and those of all their parts, each under a name of its own; fields that
    are not known are refused."""
    ordered = sorted(kinds, key=lambda kind: (kind.__module__, kind.__name__))
    references, made = models_json_schema(
        [(kind, "validation") for kind in ordered], ref_template=REFERENCE
    )
    schemas = made.get("$defs", {})
    for part in schemas.values():
        if part.get("type") == "object" and "properties" in part:
            part["additionalProperties"] = False
    return {kind: references[kind, "validation"] for kind in ordered}, schemas
