"""Bodies of requests, and what comes back over a plain connection."""

from __future__ import annotations

import json
from typing import Any

import httpx

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def chat(content: str = "hello", **more: Any) -> dict[str, Any]:
    """A chat's body, for a few tokens."""
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "max_tokens": 5, "temperature": 0, **more}


def text(prompt: Any = "hello", **more: Any) -> dict[str, Any]:
    """A text completion's body, likewise."""
    return {"prompt": prompt, "max_tokens": 5, "temperature": 0, **more}


def asked(client: httpx.Client, path: str, body: Any) -> Any:
    """The answer, which is to be one."""
    reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def refused(client: httpx.Client, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    """The error, which is to be one, in OpenAI's shape."""
    reply = client.post(path, json=body)
    assert reply.status_code == status, reply.text
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def streamed(client: httpx.Client, path: str, body: Any) -> list[Any]:
    """The chunks of a stream, which is to end as streams end."""
    with client.stream("POST", path, json={**body, "stream": True}) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def stop_in(full: str) -> str:
    """Two characters of a text, not at its beginning, that are nowhere before."""
    return next(full[i : i + 2] for i in range(3, len(full)) if full.index(full[i : i + 2]) == i)
