"""The process as a shell starts and ends it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import ollama
import openai
import psutil
import pytest

from tests.serve.ask import CHAT, chat


@pytest.fixture
def process(folder_of: Callable[[str], Path], home: Path) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-m", "outsize", "serve", str(folder_of("llama")), "--port", "0"]
    made = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    yield made
    made.kill()
    made.wait()
    if made.stderr is not None:
        made.stderr.close()


def basic_calls(url: str) -> None:
    """What programs do first, by the three clients."""
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as one:
        (model, *_) = one.models.list().data
        chats = one.chat.completions
        whole = chats.create(model=model.id, messages=messages, max_tokens=5, temperature=0)
        with chats.create(
            model=model.id, messages=messages, max_tokens=5, temperature=0, stream=True
        ) as parts:
            text = "".join(part.choices[0].delta.content or "" for part in parts)
        assert whole.choices[0].message.content == text
    with anthropic.Anthropic(base_url=url, api_key="none") as two:
        said = two.messages.create(
            model=model.id, messages=messages, max_tokens=5, extra_body={"temperature": 0}
        ).content[0]
        assert said.type == "text"
        assert said.text == text
    with ollama.Client(url) as three:
        told = three.chat(model.id, messages, options={"num_predict": 5, "temperature": 0})
        assert told.message.content == text
        assert [one.model for one in three.list().models] == [model.id]


def test_from_start_to_end(process: subprocess.Popen[str]) -> None:
    """It says where it listens before the model is open; SIGTERM ends it with its children."""
    assert process.stderr is not None
    first = process.stderr.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+", first)
    assert found is not None, first
    retries = httpx.HTTPTransport(retries=5)
    with httpx.Client(base_url=found[0], timeout=60, transport=retries) as client:
        while (health := client.get("/health")).status_code == 503:
            assert "progress" in health.json()
        assert client.post(CHAT, json=chat()).status_code == 200
        basic_calls(found[0])
        children = psutil.Process(process.pid).children(recursive=True)
        assert children, "the process that renders templates"
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(30) == 0
    assert not [child for child in children if child.is_running()]
    rest = process.stderr.read()
    assert "Traceback" not in rest
    assert "llama is ready" in rest
    assert f"POST {CHAT} 200" in rest
