"""What is asked: prompts of a given length, and the bodies of requests to each endpoint."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

Body = dict[str, Any]
TEXT = (
    "river stone cloud lamp table garden winter bread window paper silver morning road bridge music letter "
    "mountain forest island summer market kitchen doctor teacher village castle engine ship train horse bird "
    "fish apple orange butter sugar salt water fire earth wind rain snow night evening door wall floor roof "
    "chair bed clock book story poem song dance game ball color green blue yellow black white brown gold "
    "glass wood cotton leather farm field hill valley lake ocean beach sand tree leaf flower grass seed root"
)
WORDS = TEXT.split()


def words(draw: random.Random, count: int) -> str:
    """So many words in no order, each time others: no two texts begin alike."""
    return " ".join(draw.choices(WORDS, k=count))


def is_conversation(prompt: object) -> bool:
    return isinstance(prompt, list) and all(isinstance(m, dict) for m in prompt)


def messages_of(prompt: Any) -> list[dict[str, str]]:
    return prompt if is_conversation(prompt) else [{"role": "user", "content": prompt}]


def _openai(body: Body, limit: str = "max_tokens") -> Body:
    if limit != "max_tokens":
        body[limit] = body.pop("max_tokens")
        return body
    return body | ({"stream_options": {"include_usage": True}} if body["stream"] else {})


def _ollama(body: Body) -> Body:
    options = {"num_predict": body.pop("max_tokens"), "temperature": body.pop("temperature")}
    if (seed := body.pop("seed", None)) is not None:
        options["seed"] = seed
    return body | {"options": options}


def _chat(prompt: Any, body: Body) -> Body:
    return _openai(body | {"messages": messages_of(prompt)})


def _completions(prompt: Any, body: Body) -> Body:
    return _openai(body | {"prompt": prompt})


def _responses(prompt: Any, body: Body) -> Body:
    body.pop("seed", None)  # it has none
    return _openai(body | {"input": prompt}, "max_output_tokens")


def _messages(prompt: Any, body: Body) -> Body:
    body.pop("seed", None)  # it has none
    return body | {"messages": messages_of(prompt)}


def _ollama_chat(prompt: Any, body: Body) -> Body:
    return _ollama(body | {"messages": messages_of(prompt)})


def _generate(prompt: Any, body: Body) -> Body:
    return _ollama(body | {"prompt": prompt, "raw": True})


CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# By path: from a prompt and what all have in common (model, max_tokens, temperature, seed, stream) to a body.
BODIES: dict[str, Callable[[Any, Body], Body]] = {
    CHAT: _chat, COMPLETIONS: _completions, "/v1/responses": _responses, "/v1/messages": _messages,
    "/api/chat": _ollama_chat, "/api/generate": _generate,
}  # fmt: skip


def body_of(path: str, prompt: Any, common: Body) -> Body:
    """The body of a request to an endpoint, in its own names."""
    return BODIES[path](prompt, dict(common))


def flatten(turns: Sequence[dict[str, str]]) -> str:
    """A conversation as one text, for models without a chat template."""
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns) + "\nassistant:"
