"""Real models obey schemas, and call the tools that they must."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import outsize
from outsize.engine.model import Model
from outsize.options import DEFAULT_MODEL, Options
from outsize.serve.ask import REQUIRED
from outsize.serve.tools.find import format_of
from tests.serve.tools.test_formats import parse

MODELS = os.environ.get("OUTSIZE_MODELS")  # the fixture of the home takes such names away
QWEN = Path(MODELS or "missing", "qwen2.5-coder-0.5b.Q4_K_M.gguf")
pytestmark = pytest.mark.slow
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "größe": {"type": "integer", "minimum": 100, "maximum": 220},
        "stadt": {"enum": ["Zürich", "東京", "Paris 😀"]},
    },
    "required": ["name", "größe", "stadt"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city"],
        },
    },
}
ASKED = [{"role": "user", "content": "What is the weather in Zürich, in celsius?"}]


@pytest.fixture(scope="module", params=[DEFAULT_MODEL, str(QWEN)], ids=["SmolLM2", "Qwen"])
def model(request: pytest.FixtureRequest, home: Path) -> Iterator[Model]:
    if request.param == str(QWEN) and not QWEN.exists():
        pytest.skip("OUTSIZE_MODELS names no folder with Qwen's GGUF file")
    with outsize.load(request.param, grammars=True, quiet=True) as opened:
        yield opened


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_schema_is_obeyed(model: Model, temperature: float) -> None:
    chat = [{"role": "user", "content": "Describe a person who lives in Tokyo, as JSON."}]
    (reply,) = model.generate(
        [chat], schema=PERSON, max_tokens=120, temperature=temperature, seed=1
    )
    found = json.loads(reply.text)
    assert list(found) == PERSON["required"]
    assert 100 <= found["größe"] <= 220
    assert (reply.finish, "\ufffd" in reply.text) == ("stop", False)
    assert reply.tokens_per_step > 1.4, "what is forced comes several tokens a step"


def test_a_tool_is_called(model: Model) -> None:
    form = format_of("\n".join(model.pack.chat_templates.values()), model.tokens.is_marker)
    messages, variables = form.prompt(ASKED, [WEATHER])
    options = Options(
        grammar=form.grammar([WEATHER], REQUIRED, False), show_tokens=form.show_tokens,
        template_args=variables or None, max_tokens=100,
    )  # fmt: skip
    reply = model.stream_from(messages, options)
    text, calls = parse(form, list(reply), [WEATHER])  # type: ignore[arg-type]
    assert text == ""
    ((name, arguments),) = calls
    assert (name, json.loads(arguments)["city"]) == ("get_weather", "Zürich")
    assert reply.reply.finish == "stop"
