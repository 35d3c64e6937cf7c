"""Requests in the dialects that the server speaks, and the parts of what it answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx

RESPONSES, MESSAGES, OLLAMA = "/v1/responses", "/v1/messages", "/api/chat"
Json = dict[str, Any]
CITIES = ["München", "Köln"]
SCHEMA: Json = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": CITIES}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION: Json = {"name": "get_weather", "description": "The weather now", "parameters": SCHEMA}
TOOL: Json = {"type": "function", "function": FUNCTION}


def user(content: str) -> list[Json]:
    return [{"role": "user", "content": content}]


def events(lines: Iterator[str]) -> Iterator[Json]:
    """The JSON of each server-sent event, up to [DONE], or of each line."""
    for line in lines:
        text = line.removeprefix("data:").strip()
        if text == "[DONE]":
            return
        if text.startswith("{"):
            yield json.loads(text)


def streamed(client: httpx.Client, path: str, body: Mapping[str, object]) -> list[Json]:
    """All events of a reply that is streamed."""
    with client.stream("POST", path, json={**body, "stream": True}) as reply:
        assert reply.status_code == 200, reply.read()
        return list(events(reply.iter_lines()))


def deltas(chunks: Sequence[Json]) -> Iterator[Json]:
    """The deltas of the first choice."""
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] == 0:
                yield choice["delta"]


def joined(chunks: Sequence[Json], key: str = "content") -> str:
    """The text of a stream of chat chunks."""
    return "".join(delta.get(key) or "" for delta in deltas(chunks))


def said(answer: Json, key: str = "content") -> str:
    """The text of a chat reply that came whole."""
    text: str = answer["choices"][0]["message"].get(key) or ""
    return text


def finishes(chunks: Sequence[Json]) -> list[str]:
    return [c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
