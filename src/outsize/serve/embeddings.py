"""POST /v1/embeddings: refused in words, since no pack pools."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from starlette.responses import Response
from starlette.routing import BaseRoute

from outsize.serve.errors import invalid
from outsize.serve.host import Host
from outsize.serve.http import Call, post
from outsize.serve.openai_schema import Text
from outsize.serve.schema import Body, NoEffect


class EmbeddingsBody(Body):
    """Texts or tokens to embed."""

    model: Text | None = None
    input: Any
    dimensions: int | None = None
    encoding_format: Text | None = None
    user: Annotated[str | None, NoEffect()] = None


def routes(host: Host) -> list[BaseRoute]:
    return list(post(host, "/v1/embeddings", EmbeddingsBody, partial(embed, host), "/embeddings"))


async def embed(host: Host, call: Call, body: EmbeddingsBody) -> Response:
    """Raises ApiError."""
    name = host.named(body.model).name
    raise invalid(
        f"{name} writes texts and has no embeddings of them; ask a server of an embedding model",
        "model",
        "unsupported_endpoint",
    )
