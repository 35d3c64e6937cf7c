"""Ollama's chat and generate as an Ask."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from outsize.options import Options
from outsize.serve import messages as common
from outsize.serve.ask import AUTO, Ask
from outsize.serve.errors import invalid
from outsize.serve.ollama_schema import Chat, Generate, Message, Request, Settings
from outsize.serve.schema import NoEffect

ROLES = ("system", "user", "assistant", "tool")
EFFORTS = ("low", "medium", "high")
# What Ollama takes where a request says nothing; but for its penalty of repetition (1.1), which would make an
# answer at temperature 0 another one than in the other dialects.
DEFAULTS = {"temperature": 0.8, "top_p": 0.9, "min_p": 0.0}
NAMES = {"max_tokens": "options.num_predict", "stop": "options.stop"}
DURATION = re.compile(r"-?(?:\d+(?:\.\d+)?(?:h|ms|us|ns|m|s))+|0")  # as Go writes them: "1h30m"


def chat_ask(body: Chat, context: int | None) -> Ask:
    """What the engine is asked for. `context`: tokens, as far as it is known. Raises ApiError."""
    tools = tuple(
        common.function(
            tool.function.name, tool.function.description, tool.function.parameters, f"tools.{i}"
        )
        for i, tool in enumerate(body.tools or [])
    )
    common.check_tools(tools, AUTO, "tools")
    messages = list(_messages(body.messages or []))
    going_on = bool(messages) and common.is_prefill(messages[-1])
    return Ask(
        prompt=messages,
        options=_options(body, context, {"continue_final": going_on}),
        tools=tools,
        stream=body.stream is not False,
    )


def generate_ask(body: Generate, context: int | None) -> Ask:
    """As `chat_ask`; a raw prompt is a text to continue, another is a user's message."""
    stream, prompt = body.stream is not False, body.prompt or ""
    if body.raw:
        if body.system:
            raise invalid(
                "system: a raw prompt has no system message; write it into the prompt", "system"
            )
        return Ask(prompt=prompt, options=_options(body, context, {"raw": True}), stream=stream)
    system = [{"role": "system", "content": body.system}] if body.system else []
    user = {"role": "user", "content": prompt}
    return Ask(prompt=[*system, user], options=_options(body, context, {}), stream=stream)


def only_loads(body: Chat | Generate) -> bool:
    """Is nothing asked but that the model be opened, or, with `keep_alive` 0, closed?"""
    return not (body.messages if isinstance(body, Chat) else body.prompt)


def keeps_for(value: float | str | None) -> float | None:
    """Seconds of `keep_alive`; None where it is not given. Below 0: for ever. Raises ApiError."""
    if value is None or isinstance(value, float | int):
        return value
    if not DURATION.fullmatch(value):
        raise invalid(
            f'keep_alive is {value[:80]!r}; seconds, or a duration as "5m" is expected',
            "keep_alive",
        )
    units = {"h": 3600, "m": 60, "s": 1, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
    parts = re.findall(r"(\d+(?:\.\d+)?)(h|ms|us|ns|m|s)", value)
    return sum(float(n) * units[u] for n, u in parts) * (-1 if value.startswith("-") else 1)


def without_effect(body: Request) -> list[str]:
    """The options that were given and change nothing here."""
    given = body.options or Settings()
    names = [
        n
        for n, f in Settings.model_fields.items()
        if any(isinstance(m, NoEffect) for m in f.metadata)
    ]
    return [f"options.{name}" for name in names if getattr(given, name) is not None]


def _options(body: Request, context: int | None, more: Mapping[str, object]) -> Options:
    given = body.options or Settings()
    if given.num_ctx is not None and context is not None and given.num_ctx > context:
        raise invalid(
            f"options.num_ctx is {given.num_ctx:,}, and the server's context is {context:,} tokens; leave it "
            "out, or start the server with a larger --context",
            "options.num_ctx",
            "context_length_exceeded",
        )
    if given.num_predict == 0:
        raise invalid(
            "options.num_predict is 0; at least 1, or -1 for no limit, is expected",
            "options.num_predict",
        )
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    limit = given.num_predict if given.num_predict is not None else -1
    changes: dict[str, object] = {
        "max_tokens": limit if limit > 0 else common.UNBOUNDED,
        "seed": given.seed if given.seed is not None and given.seed >= 0 else None,
        "stop": given.stop,
        "schema": _schema(body.format),
        "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
        "template_args": _thinking(body.think) or None,
        **DEFAULTS,
        **{n: getattr(given, n) for n in SAME if getattr(given, n) is not None},
        **more,
    }
    return common.options(changes, NAMES)


SAME = (
    "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n", "presence_penalty",
    "frequency_penalty",
)  # fmt: skip


def _schema(format: str | Mapping[str, object] | None) -> Mapping[str, object] | None:
    if isinstance(format, str):
        if format not in ("", "json"):
            raise invalid(
                f'format is {format[:80]!r}; "json" or a JSON schema is expected', "format"
            )
        return common.ANY_JSON if format else None
    return format


def _thinking(think: bool | str | None) -> dict[str, object]:
    if isinstance(think, str):
        if think not in EFFORTS:
            raise invalid(
                f"think is {think[:80]!r}; true, false, {', '.join(EFFORTS)} are expected", "think"
            )
        return common.thinking(True, think)
    return common.thinking(think, None)


def _messages(given: list[Message]) -> Iterator[dict[str, object]]:
    names: dict[str, str] = {}
    for i, message in enumerate(given):
        role, text = message.role.lower(), message.content or ""
        if role not in ROLES:
            raise invalid(
                f"messages.{i}.role is {message.role[:80]!r}; one of {', '.join(ROLES)} is expected",
                f"messages.{i}.role",
            )
        if role == "tool":
            name = message.tool_name or names.get(message.tool_call_id or "")
            yield common.tool_result(message.tool_call_id, name, text)
            continue
        made: dict[str, object] = {"role": role, "content": text}
        if message.thinking:
            made["reasoning_content"] = message.thinking
        if message.tool_calls:
            made["tool_calls"] = [
                common.call(
                    call.id or common.new_id("call_"),
                    call.function.name,
                    call.function.arguments or {},
                )
                for call in message.tool_calls
            ]
            names |= common.names_by_call([made])
        yield made
