"""What dialects share on the way in: texts of content parts, tools, calls and their results, as chat
templates know them.

A message for a template is {"role", "content"}, an assistant's perhaps with "reasoning_content" and
"tool_calls" whose arguments are objects, a tool's with "tool_call_id" and "name".
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from outsize.errors import OptionError
from outsize.options import Options
from outsize.serve.ask import AUTO, NONE, REQUIRED, Ask, Tool
from outsize.serve.errors import ApiError, invalid, of
from outsize.text.template import Message

ANY_JSON: Mapping[str, object] = {"type": "object"}  # of "json" without a schema: an object
THINKING = ("enable_thinking", "thinking", "reasoning_effort")  # variables of templates
UNBOUNDED = 1 << 24  # tokens of a reply that ends by itself, or where the context does
TEMPERATURE, TOP_P = 1.0, 1.0  # where a request to OpenAI or Anthropic says nothing
BETWEEN_TURNS = "\n\n"  # of one side, where they become one


def new_id(prefix: str) -> str:
    """An identifier that nobody else has: the prefix and 24 hexadecimal digits."""
    return prefix + uuid.uuid4().hex[:24]


def joined(texts: Iterable[str]) -> str:
    """The text parts of a message as one text."""
    return "".join(texts)


def not_read(kind: str, param: str) -> ApiError:
    """The refusal of a content part that is no text. `kind`: what it calls itself."""
    return invalid(
        f"{param}: a part of type {kind[:80]!r} cannot be read: this model reads text alone; leave it out, "
        "or describe it in words",
        param,
        "unsupported_parameter",
    )


def function(
    name: str, description: str | None, parameters: Mapping[str, object] | None, param: str
) -> Tool:
    """A tool as OpenAI's chat has it, and as templates know it. Raises ApiError."""
    if not name.strip():
        raise invalid(f"{param}: a tool needs a name", param)
    schema = parameters if parameters is not None else {"type": "object", "properties": {}}
    told: dict[str, object] = {"name": name}
    if description is not None:
        told["description"] = description
    return {"type": "function", "function": {**told, "parameters": schema}}


def name_of(tool: Tool) -> str:
    """The name of a tool that `function` made."""
    inner = tool["function"]
    return str(inner["name"]) if isinstance(inner, Mapping) else ""


def check_tools(tools: Sequence[Tool], choice: str, param: str) -> None:
    """Raises ApiError for two tools of one name, and for a choice that none of them can meet."""
    names = [name_of(tool) for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise invalid(f"tools: there are two of the name {name[:80]!r}", "tools")
    if choice in (AUTO, NONE):
        return
    if not names:
        raise invalid(f"{param} wants a tool to be called, and there are no tools", param)
    if choice != REQUIRED and choice[1:] not in names:
        raise invalid(
            f"{param} names the tool {choice[1:][:80]!r}; there are {', '.join(names)[:300]}", param
        )


def call(id: str, name: str, arguments: Mapping[str, object]) -> dict[str, object]:
    """One call in an assistant's message. (Templates write the arguments as JSON themselves.)"""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": dict(arguments)}}


def parsed_arguments(text: str, param: str) -> Mapping[str, object]:
    """The arguments of a call, from their JSON; none where there is no text. Raises ApiError."""
    try:
        made = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        made = None
    if not isinstance(made, dict):
        raise invalid(f"{param} is {text[:80]!r}; a JSON object is expected", param)
    return made


def object_of(text: str) -> Mapping[str, object] | None:
    """The arguments that a model wrote, or None where they are no object: it was cut in the middle. Half of
    a surrogate pair, which no UTF-8 can hold, becomes U+FFFD."""
    try:
        made = json.loads(text) if text.strip() else {}
        whole = json.dumps(made, ensure_ascii=False).encode("utf-16", "surrogatepass")
        made = json.loads(whole.decode("utf-16", "replace"))
    except (ValueError, RecursionError):
        return None
    return made if isinstance(made, dict) else None


def cut_call(name: str, arguments: str) -> str:
    """The text of a call that is not complete: what was written does not vanish."""
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {arguments}'


def thinking(on: bool | None, effort: str | None) -> dict[str, object]:
    """Template arguments that turn thinking on or off, and say how much: Qwen's, DeepSeek's and gpt-oss's
    templates each know some of them."""
    made: dict[str, object] = {} if on is None else {"enable_thinking": on, "thinking": on}
    if effort is not None:
        made["reasoning_effort"] = effort
    return made


def untold(ask: Ask, templates: Iterable[str]) -> bool:
    """Is thinking asked for, or not wanted, and does the model's chat template not know of it?"""
    asked = [name for name in THINKING if name in (ask.options.template_args or {})]
    known = "\n".join(templates)
    return bool(asked) and not any(name in known for name in asked)


def with_adapter(ask: Ask, adapter: str | None) -> Ask:
    """The same, of a model with an adapter."""
    return ask if adapter is None else replace(ask, options=replace(ask.options, adapter=adapter))


def options(changes: Mapping[str, object], names: Mapping[str, str]) -> Options:
    """Options from a request's fields, where None is absent. `names`: the dialect's own, by ours, for what
    is said of a wrong one. Raises ApiError."""
    given = {name: value for name, value in changes.items() if value is not None}
    try:
        return Options(**given)  # type: ignore[arg-type]
    except OptionError as e:
        raise _renamed(e, given, names) from None


def _renamed(error: OptionError, given: Mapping[str, object], names: Mapping[str, str]) -> ApiError:
    told = of(error, given)
    theirs = names.get(told.param or "")
    if theirs is None or told.param is None:
        return told
    return invalid(told.message.replace(told.param, theirs, 1), theirs)


def tool_result(id: str | None, name: str | None, text: str) -> dict[str, object]:
    """What a tool answered, as a message."""
    made: dict[str, object] = {"role": "tool", "content": text}
    if id is not None:
        made["tool_call_id"] = id
    return made if name is None else {**made, "name": name}


def names_by_call(messages: Sequence[Message]) -> dict[str, str]:
    """The names of the tools that were called, by the calls' ids: some templates want them with results."""
    found = {}
    for message in messages:
        calls = message.get("tool_calls")
        for made in calls if isinstance(calls, list) else []:
            found[str(made["id"])] = str(made["function"]["name"])
    return found


def one_turn(first: Message, second: Message) -> dict[str, object]:
    """Two messages of one role as one."""
    made = {**first, **second}
    for name in ("content", "reasoning_content"):
        if name in first or name in second:
            texts = (str(first.get(name) or ""), str(second.get(name) or ""))
            made[name] = BETWEEN_TURNS.join(text for text in texts if text)
    calls = [*_calls(first), *_calls(second)]
    return {**made, "tool_calls": calls} if calls else made


def _calls(message: Message) -> list[object]:
    calls = message.get("tool_calls")
    return list(calls) if isinstance(calls, list) else []


def is_prefill(message: Message) -> bool:
    """Is this last message the beginning of the answer?"""
    return message["role"] == "assistant" and bool(message.get("content")) and not _calls(message)
