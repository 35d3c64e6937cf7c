"""Anthropic's messages as an Ask: turns, blocks, tools and choices, as templates and the engine know them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from outsize.options import Options
from outsize.serve import messages as common
from outsize.serve.anthropic_schema import (
    Block,
    CountTokens,
    Create,
    Foreign,
    Plain,
    Redacted,
    ServerTool,
    Text,
    Thinking,
    ToolChoice,
    ToolResult,
    ToolUse,
    Turn,
)
from outsize.serve.ask import AUTO, NONE, REQUIRED, Ask, Tool
from outsize.serve.errors import invalid
from outsize.text.template import Message

NAMES = {"stop": "stop_sequences"}


def ask_of(body: CountTokens) -> Ask:
    """What the engine is asked for. Raises ApiError."""
    tools, choice = _tools(body), _choice(body.tool_choice)
    common.check_tools(tools, choice, "tool_choice")
    turns = list(_merged(_turns(body)))
    create = body if isinstance(body, Create) else None
    single = body.tool_choice.disable_parallel_tool_use if body.tool_choice else None
    return Ask(
        prompt=turns,
        options=_options(body, turns),
        tools=tools,
        tool_choice=choice,
        parallel_tools=None if single is None else not single,
        stream=bool(create and create.stream),
    )


def shows_thinking(body: CountTokens) -> bool:
    """Does the client want to read what the model thinks?"""
    return body.thinking is None or body.thinking.display != "omitted"


def _options(body: CountTokens, turns: Sequence[Message]) -> Options:
    changes: dict[str, object] = {
        "template_args": _template_args(body) or None,
        "continue_final": common.is_prefill(turns[-1]),
    }
    config = body.output_config
    if config is not None and config.format is not None:
        changes["schema"] = config.format.schema_
    if isinstance(body, Create):
        changes |= {
            "max_tokens": body.max_tokens,
            "temperature": common.TEMPERATURE if body.temperature is None else body.temperature,
            "top_p": common.TOP_P if body.top_p is None else body.top_p,
            "top_k": body.top_k,
            "stop": tuple(body.stop_sequences or ()),
        }
    return common.options(changes, NAMES)


def _template_args(body: CountTokens) -> dict[str, object]:
    on = None if body.thinking is None else body.thinking.type != "disabled"
    effort = None if body.output_config is None else body.output_config.effort
    return common.thinking(on, "high" if effort in ("xhigh", "max") else effort)


def _choice(choice: ToolChoice | None) -> str:
    if choice is None:
        return AUTO
    if choice.type == "tool":
        if not choice.name:
            raise invalid("tool_choice: type 'tool' needs a name", "tool_choice.name")
        return f"={choice.name}"
    return {"auto": AUTO, "any": REQUIRED, "none": NONE}[choice.type]


def _tools(body: CountTokens) -> tuple[Tool, ...]:
    made = []
    for i, tool in enumerate(body.tools or []):
        if isinstance(tool, ServerTool):
            raise invalid(
                f"tools.{i}: a tool of type {tool.type[:80]!r} runs on Anthropic's servers; outsize knows "
                "tools that the client runs alone (type 'custom')",
                f"tools.{i}.type",
                "unsupported_parameter",
            )
        made.append(common.function(tool.name, tool.description, tool.input_schema, f"tools.{i}"))
    return tuple(made)


def _texts(blocks: list[Plain], path: str) -> str:
    for i, block in enumerate(blocks):
        if isinstance(block, Foreign):
            raise common.not_read(block.type, f"{path}.{i}")
    return common.joined(block.text for block in blocks if isinstance(block, Text))


def _turns(body: CountTokens) -> Iterator[dict[str, object]]:
    """Messages as templates know them; a turn with results of tools is several."""
    if system := _texts(body.system or [], "system"):
        yield {"role": "system", "content": system}
    names: dict[str, str] = {}
    for i, turn in enumerate(body.messages):
        path = f"messages.{i}.content"
        if turn.role == "assistant":
            made = _answered(turn.content, path)
            names |= common.names_by_call([made])
            yield made
        else:
            yield from _said(turn, path, names)


def _answered(blocks: list[Block], path: str) -> dict[str, object]:
    """An assistant's turn."""
    texts, thoughts, calls = [], [], []
    for i, block in enumerate(blocks):
        match block:
            case Text():
                texts.append(block.text)
            case Thinking():
                thoughts.append(block.thinking)
            case ToolUse():
                calls.append(common.call(block.id, block.name, block.input or {}))
            case Redacted():  # nobody can read it, the model neither
                pass
            case _:
                raise common.not_read(block.type, f"{path}.{i}")
    made: dict[str, object] = {"role": "assistant", "content": common.joined(texts)}
    if thoughts:
        made["reasoning_content"] = common.joined(thoughts)
    return {**made, "tool_calls": calls} if calls else made


def _said(turn: Turn, path: str, names: Mapping[str, str]) -> Iterator[dict[str, object]]:
    """A user's or the system's turn: runs of texts, and results of tools, in their order."""
    texts: list[str] = []
    for i, block in enumerate(turn.content):
        if isinstance(block, Text):
            texts.append(block.text)
            continue
        if not isinstance(block, ToolResult) or turn.role == "system":
            raise common.not_read(block.type, f"{path}.{i}")
        if texts:
            yield {"role": turn.role, "content": common.joined(texts)}
            texts = []
        yield _result(block, f"{path}.{i}.content", names)
    if texts or not turn.content:
        yield {"role": turn.role, "content": common.joined(texts)}


def _result(block: ToolResult, path: str, names: Mapping[str, str]) -> dict[str, object]:
    text = _texts(block.content or [], path)
    said = f"Error: {text}" if block.is_error else text
    return common.tool_result(block.tool_use_id, names.get(block.tool_use_id), said)


def _merged(turns: Iterator[dict[str, object]]) -> Iterator[dict[str, object]]:
    """Turns of one side in a row are one turn, as Anthropic's are."""
    last: dict[str, object] | None = None
    for turn in turns:
        if (
            last is None
            or last["role"] != turn["role"]
            or turn["role"] not in ("user", "assistant")
        ):
            if last is not None:
                yield last
            last = turn
            continue
        last = common.one_turn(last, turn)
    if last is not None:
        yield last
