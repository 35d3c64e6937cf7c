"""What every client relies on, asked with no client's help."""

from __future__ import annotations

import httpx


def chat(content: str = "hello", **more: object) -> dict[str, object]:
    """A body of a request for a few tokens."""
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "max_tokens": 5, "temperature": 0, **more}


def test_a_stream_brings_the_same_text(client: httpx.Client) -> None:
    whole = client.post("/v1/chat/completions", json=chat())
    assert whole.status_code == 200
    with client.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    text = "".join(
        choice["delta"].get("content") or ""
        for line in lines[:-1]
        for choice in httpx.Response(200, text=line.removeprefix("data: ")).json()["choices"]
    )
    assert text == whole.json()["choices"][0]["message"]["content"]
