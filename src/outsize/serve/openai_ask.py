"""From the fields of a chat's body to what the engine is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outsize.engine.model import Model
from outsize.options import Options
from outsize.serve.ask import AUTO, NONE, Ask, Tool
from outsize.serve.errors import invalid
from outsize.serve.host import Named
from outsize.serve.http import Call
from outsize.serve.openai_common import sampling
from outsize.serve.openai_schema import ChatBody, Message, ResponseFormat, ToolChoice, ToolSpec
from outsize.text.prompt import OWN
from outsize.text.template import Messages

EFFORT = "reasoning_effort"


def ask_of(call: Call, body: ChatBody, named: Named, model: Model) -> Ask:
    """Raises ApiError, OptionError."""
    made = sampling(body, model)
    limits = [n for n in (body.max_tokens, body.max_completion_tokens) if n is not None]
    made["max_tokens"] = min(limits, default=model.context)
    made |= {"adapter": named.adapter, "logprobs": _logprobs(body)}
    made["template_args"] = _template_args(call, body, model)
    made["continue_final"] = _continues(body)
    made["schema"] = schema_of(body.response_format)
    tools, choice = tools_of(body)
    return Ask(
        prompt=messages_of(body.messages),
        options=Options(**made),
        count=body.n or 1,
        tools=tools,
        tool_choice=choice,
        parallel_tools=body.parallel_tool_calls,
        stream=bool(body.stream),
    )


def messages_of(messages: list[Message]) -> Messages:
    """As chat templates take them. Raises ApiError."""
    return [_message(message, f"messages.{i}") for i, message in enumerate(messages)]


def _message(message: Message, path: str) -> dict[str, object]:
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    made: dict[str, object] = {"role": role, "content": _content(message, path)}
    thought = message.reasoning_content or message.reasoning
    if thought and message.role == "assistant":
        made["reasoning_content"] = thought
    for name in ("name", "tool_call_id"):
        if getattr(message, name) is not None:
            made[name] = getattr(message, name)
    if message.tool_calls:
        if message.role != "assistant":
            raise invalid(
                f"{path}.tool_calls: a {message.role} calls no tools", f"{path}.tool_calls"
            )
        made["tool_calls"] = [
            call.model_dump(include={"id", "type", "function"}) for call in message.tool_calls
        ]
    elif message.content is None and role not in ("assistant", "tool"):  # a tool may say nothing
        raise invalid(
            f"{path}.content: a {message.role}'s message needs a content", f"{path}.content"
        )
    return made


def _content(message: Message, path: str) -> str:
    """Text, its parts joined."""
    if not isinstance(message.content, list):
        return message.content or ""
    for i, part in enumerate(message.content):
        if part.type != "text" or part.text is None:
            raise invalid(
                f"{path}.content.{i}: a part of type {part.type!r}; this model reads text alone, as "
                '{"type": "text", "text": ...}',
                f"{path}.content.{i}.type",
            )
    return "".join(part.text or "" for part in message.content)


def _logprobs(body: ChatBody) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    return body.top_logprobs or 0 if body.logprobs else None


def _template_args(call: Call, body: ChatBody, model: Model) -> dict[str, Any] | None:
    """Variables for the chat template; those that it does not know are without effect, and that is said."""
    made = dict(body.chat_template_kwargs or {})
    for name in (*OWN, "tools"):
        if name in made:
            raise invalid(
                f"chat_template_kwargs.{name} is set by the server; leave it out",
                "chat_template_kwargs",
            )
    if body.reasoning_effort is not None:
        made[EFFORT] = body.reasoning_effort
        if body.reasoning_effort == "none":
            made["enable_thinking"] = False
        known = "\n".join(model.pack.chat_templates.values())
        if EFFORT not in known and "enable_thinking" not in known:
            call.ignored.append(EFFORT)
    return made or None


def _continues(body: ChatBody) -> bool:
    """Is the last message to be continued?"""
    begins, goes_on = body.add_generation_prompt, bool(body.continue_final_message)
    if begins is not None and begins == goes_on:
        raise invalid(
            "add_generation_prompt and continue_final_message exclude one another: give one of them",
            "add_generation_prompt",
        )
    if goes_on and body.messages[-1].role != "assistant":
        raise invalid(
            "continue_final_message: the last message is not the assistant's",
            "continue_final_message",
        )
    if [message.role for message in body.messages[-2:]] == ["assistant"] * 2:
        raise invalid(
            "messages: the last two are the assistant's; which is to be answered?", "messages"
        )
    return goes_on


def schema_of(given: ResponseFormat | None) -> Mapping[str, object] | None:
    """Raises ApiError."""
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return given.schema_ or {"type": "object"}
    inner = given.json_schema
    if inner is None or inner.schema_ is None:
        raise invalid("response_format.json_schema.schema is missing", "response_format")
    return inner.schema_


def tools_of(body: ChatBody) -> tuple[tuple[Tool, ...], str]:
    """The tools, and which of them is to be called. Raises ApiError."""
    tools = tuple(tool_of(spec) for spec in body.tools or ())
    names = [spec.function.name for spec in body.tools or ()]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise invalid(f"tools: {twice!r} is there twice", "tools")
    choice = body.tool_choice or AUTO
    if isinstance(choice, ToolChoice):
        if choice.function.name not in names:
            raise invalid(
                f"tool_choice names {choice.function.name!r}, which is not in tools", "tool_choice"
            )
        return tools, f"={choice.function.name}"
    if not tools and choice not in (AUTO, NONE):
        raise invalid(f"tool_choice is {choice!r}, and there are no tools", "tool_choice")
    return tools, choice


def tool_of(spec: ToolSpec) -> Tool:
    """A tool as chat templates take it."""
    given = spec.function.model_dump(exclude_none=True)
    return {
        "type": "function",
        "function": {"parameters": {"type": "object", "properties": {}}, **given},
    }
