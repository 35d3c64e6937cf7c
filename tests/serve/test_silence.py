"""Signs of life while nothing comes: each dialect's own, and no client stumbles over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import ollama
import openai
import pytest

from outsize.serve.options import ServeOptions
from tests.serve.conftest import Running, serving
from tests.serve.test_dialects import SAID


@pytest.fixture(scope="module")
def restless(tiny: Callable[[], Any]) -> Iterator[Running]:
    """A server that takes every pause for silence."""
    options = ServeOptions(port=0, grace=0.0, alias=("m",), silence_s=1e-6)
    with serving(tiny, options) as running:
        yield running.until_ready()


def test_what_is_sent(restless: Running) -> None:
    signs = {
        "/v1/messages": ({"max_tokens": 5}, 'event: ping\ndata: {"type":"ping"}\n\n'),
        "/v1/responses": ({"max_output_tokens": 5}, ": working\n\n"),
        "/api/chat": ({"options": {"num_predict": 5}}, '"content":""},"done":false}\n'),
    }
    with restless.client() as client:
        for path, (limit, sign) in signs.items():
            said = {"input": SAID} if path == "/v1/responses" else {"messages": SAID}
            text = client.post(path, json={**said, **limit, "stream": True}).text
            assert sign in text, path


def test_clients_do_not_mind(restless: Running) -> None:
    url = restless.url
    with anthropic.Anthropic(base_url=url, api_key="x") as claude:
        more: Any = {"extra_body": {"temperature": 0}}
        with claude.messages.stream(model="m", max_tokens=20, messages=SAID, **more) as stream:  # type: ignore[arg-type]
            text = stream.get_final_text()
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x") as client:
        ask: Any = {"model": "m", "input": SAID, "max_output_tokens": 20, "temperature": 0}
        *_, last = client.responses.create(stream=True, **ask)
    with ollama.Client(url, trust_env=False) as llama:
        options = {"num_predict": 20, "temperature": 0}
        parts = list(llama.chat("m", messages=SAID, options=options, stream=True))
    assert (
        text == last.response.output_text == "".join(p.message.content or "" for p in parts) != ""
    )
