"""POST /tokenize and /detokenize, GET /tokenizer_info: between text and tokens, as vLLM's and llama.cpp's
servers do it. lm-eval's remote tokenizer asks for them."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from pydantic import Field
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute

from outsize.options import Options
from outsize.serve.errors import invalid
from outsize.serve.host import Host
from outsize.serve.http import Call, get, post
from outsize.serve.openai_ask import messages_of, tool_of
from outsize.serve.openai_schema import (
    MOST_IDS,
    MOST_MESSAGES,
    MOST_TOOLS,
    Message,
    Text,
    ToolSpec,
)
from outsize.serve.schema import Body, Neutral


class TokenizeBody(Body):
    """A text (`prompt`, or `content`), or messages for the chat template."""

    model: Text | None = None
    prompt: str | None = None
    content: str | None = None
    messages: Annotated[
        list[Message] | None, Field(fail_fast=True, min_length=1, max_length=MOST_MESSAGES)
    ] = None
    add_special_tokens: bool | None = None  # the model's start token; true
    add_special: bool | None = None  # llama.cpp's name of it
    parse_special: bool | None = None  # names of control tokens are control tokens; false
    with_pieces: bool | None = None  # each token's text, too, as llama.cpp gives it
    add_generation_prompt: Annotated[bool | None, Neutral((True,))] = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[ToolSpec] | None, Field(fail_fast=True, max_length=MOST_TOOLS)] = None


class DetokenizeBody(Body):
    """Token ids."""

    model: Text | None = None
    tokens: Annotated[list[int], Field(fail_fast=True, max_length=MOST_IDS)]


def routes(host: Host) -> list[BaseRoute]:
    return [
        *post(host, "/tokenize", TokenizeBody, partial(tokenize, host), "/v1/tokenize"),
        *post(host, "/detokenize", DetokenizeBody, partial(detokenize, host), "/v1/detokenize"),
        *get("/tokenizer_info", partial(info, host)),
    ]


async def tokenize(host: Host, call: Call, body: TokenizeBody) -> Response:
    """Raises ApiError, OutsizeError."""
    host.named(body.model)
    texts = [text for text in (body.prompt, body.content) if text is not None]
    if len(texts) + (body.messages is not None) != 1:
        raise invalid("one of `prompt`, `content` and `messages` is expected", "prompt")
    service = await host.service()
    tokens = service.model.tokens
    if body.messages is not None:
        options = Options(template_args=_template_args(body))
        ids = await service.encode(messages_of(body.messages), options)
    else:
        options = Options(raw=True, special=bool(body.parse_special))
        ids = await service.encode(texts[0], options) if texts[0] else list(tokens.start)
        if body.add_special_tokens is False or body.add_special is False:
            ids = ids[len(tokens.start) :]
    made: dict[str, Any] = {
        "tokens": ids,
        "count": len(ids),
        "max_model_len": service.model.context,
    }
    if body.with_pieces:
        made["tokens"] = [{"id": i, "piece": _piece(tokens.bytes_of(i))} for i in ids]
    return JSONResponse(made)


def _template_args(body: TokenizeBody) -> dict[str, Any]:
    """The chat template's variables."""
    tools = [tool_of(spec) for spec in body.tools or ()]
    return {**(body.chat_template_kwargs or {}), **({"tools": tools} if tools else {})}


def _piece(raw: bytes) -> str | list[int]:
    """A token's text, or its bytes where they are none."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


async def detokenize(host: Host, call: Call, body: DetokenizeBody) -> Response:
    """Raises ApiError, OutsizeError."""
    host.named(body.model)
    service = await host.service()
    if body.tokens:
        service.model.tokens.check(body.tokens)
    text = service.model.tokens.decode(body.tokens)
    return JSONResponse({"prompt": text, "content": text})


async def info(host: Host, call: Call) -> Response:
    """The tokenizer's control tokens, and the chat template."""
    model = (await host.service()).model
    pack = model.pack
    names = dict(pack.special_tokens)
    if pack.eos and "eos_token" not in names:
        names["eos_token"] = model.tokens.piece(pack.eos[0])
    return JSONResponse(
        {
            **names,
            "bos_token_id": pack.bos,
            "eos_token_ids": list(pack.eos),
            "add_bos_token": bool(model.tokens.start),
            "vocab_size": pack.description.vocab_size,
            "model_max_length": model.context,
            "chat_template": pack.chat_templates.get("default"),
        }
    )
