"""OpenAI's responses as an Ask: items become messages, and what is not text is refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from outsize.options import Options
from outsize.serve import messages as common
from outsize.serve.ask import AUTO, NONE, REQUIRED, Ask, Tool
from outsize.serve.errors import invalid
from outsize.serve.responses_schema import (
    AllowedTools,
    Create,
    Foreign,
    Format,
    FunctionCall,
    FunctionOutput,
    Message,
    NamedTool,
    Part,
    Reasoning,
    Refusal,
    Words,
)

LOGPROBS, SEALED = "message.output_text.logprobs", "reasoning.encrypted_content"
NAMES = {"max_tokens": "max_output_tokens"}
SYSTEM = {"developer": "system"}  # what templates call it


def ask_of(body: Create) -> Ask:
    """What the engine is asked for. Raises ApiError."""
    tools, choice = _allowed(body, _tools(body))
    common.check_tools(tools, choice, "tool_choice")
    return Ask(
        prompt=_messages(body),
        options=_options(body),
        tools=tools,
        tool_choice=choice,
        parallel_tools=body.parallel_tool_calls,
        stream=bool(body.stream),
    )


def _options(body: Create) -> Options:
    effort = body.reasoning.effort if body.reasoning else None
    on = None if effort is None else effort != "none"
    changes: dict[str, object] = {
        "max_tokens": body.max_output_tokens or common.UNBOUNDED,
        "temperature": common.TEMPERATURE if body.temperature is None else body.temperature,
        "top_p": common.TOP_P if body.top_p is None else body.top_p,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "logprobs": _logprobs(body),
        "schema": _schema(body.text.format if body.text else None),
        "template_args": common.thinking(on, effort if on else None) or None,
    }
    return common.options(changes, NAMES)


def _logprobs(body: Create) -> int | None:
    """How many likely tokens are told; None: no log-probabilities at all."""
    for i, name in enumerate(body.include or []):
        if name not in (LOGPROBS, SEALED):
            raise invalid(
                f"include.{i}: {name[:80]!r} is not here; there are {LOGPROBS!r}, and {SEALED!r}, which "
                "is told in plain text",
                "include",
                "unsupported_parameter",
            )
    asked = body.top_logprobs is not None or LOGPROBS in (body.include or [])
    return (body.top_logprobs or 0) if asked else None


def _schema(format: Format | None) -> Mapping[str, object] | None:
    if format is None or format.type == "text":
        return None
    if format.type == "json_object":
        return common.ANY_JSON
    if format.schema_ is None:
        raise invalid("text.format: type 'json_schema' needs a schema", "text.format.schema")
    return format.schema_


def _tools(body: Create) -> tuple[Tool, ...]:
    made = []
    for i, tool in enumerate(body.tools or []):
        if isinstance(tool, Foreign):
            raise invalid(
                f"tools.{i}: a tool of type {tool.type[:80]!r} runs on OpenAI's servers; outsize knows tools "
                "that the client runs alone (type 'function')",
                f"tools.{i}.type",
                "unsupported_parameter",
            )
        made.append(common.function(tool.name, tool.description, tool.parameters, f"tools.{i}"))
    return tuple(made)


def _allowed(body: Create, tools: tuple[Tool, ...]) -> tuple[tuple[Tool, ...], str]:
    """The tools that may be called, and the choice among them."""
    choice = body.tool_choice
    if isinstance(choice, NamedTool):
        return tools, f"={choice.name}"
    if not isinstance(choice, AllowedTools):
        return tools, {None: AUTO, "auto": AUTO, "none": NONE, "required": REQUIRED}[choice]
    for named in choice.tools:
        common.check_tools(tools, f"={named.name}", "tool_choice")
    names = [named.name for named in choice.tools]
    allowed = tuple(tool for tool in tools if common.name_of(tool) in names)
    return allowed, REQUIRED if choice.mode == "required" else AUTO


def _text(parts: Sequence[Part], path: str) -> str:
    for i, part in enumerate(parts):
        if isinstance(part, Foreign):
            raise common.not_read(part.type, f"{path}.{i}")
    texts = [part.text for part in parts if isinstance(part, Words)]
    return common.joined([*texts, *(part.refusal for part in parts if isinstance(part, Refusal))])


def _messages(body: Create) -> list[dict[str, object]]:
    """The system message of `instructions`, and those of all items."""
    made: list[dict[str, object]] = []
    made += [{"role": "system", "content": body.instructions}] if body.instructions else []
    return [*made, *_turns(body)]


def _turns(body: Create) -> Iterator[dict[str, object]]:
    """What the assistant thought, said and called in a row is one message."""
    turn: dict[str, object] | None = None
    names: dict[str, str] = {}
    for i, item in enumerate(body.input):
        path = f"input.{i}"
        made = _of_assistant(item, path)
        if made is not None:
            turn = made if turn is None else common.one_turn(turn, made)
            names |= common.names_by_call([made])
            continue
        if turn is not None:
            yield turn
            turn = None
        yield _of_others(item, path, names)
    if turn is not None:
        yield turn


def _of_assistant(item: object, path: str) -> dict[str, object] | None:
    """What the assistant did, as a message; None: it was another's."""
    match item:
        case Message(role="assistant"):
            return {"role": "assistant", "content": _text(item.content, f"{path}.content")}
        case Reasoning():
            parts = item.content or item.summary or []
            return {"role": "assistant", "content": "", "reasoning_content": _text(parts, path)}
        case FunctionCall():
            arguments = common.parsed_arguments(item.arguments, f"{path}.arguments")
            call = common.call(item.call_id, item.name, arguments)
            return {"role": "assistant", "content": "", "tool_calls": [call]}
    return None


def _of_others(item: object, path: str, names: Mapping[str, str]) -> dict[str, object]:
    match item:
        case Message():
            role = SYSTEM.get(item.role, item.role)
            return {"role": role, "content": _text(item.content, f"{path}.content")}
        case FunctionOutput():
            name = item.name or names.get(item.call_id)
            return common.tool_result(item.call_id, name, _text(item.output, f"{path}.output"))
        case Foreign(type="item_reference"):
            raise invalid(
                f"{path}: no responses are kept here, so no item of one can be referred to; send it whole",
                path,
                "unsupported_parameter",
            )
    raise common.not_read(getattr(item, "type", ""), path)
