"""The bodies of Anthropic's POST /v1/messages and /v1/messages/count_tokens, field by field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag

from outsize.serve.openai_schema import MOST_MESSAGES, MOST_TOOLS, Stop
from outsize.serve.openai_schema import Text as Name
from outsize.serve.schema import Body, Neutral, NoEffect

LIST = Field(fail_fast=True, max_length=MOST_MESSAGES)
CALLERS: tuple[list[str], ...] = (["direct"], [])


class Text(Body):
    """Text."""

    type: Literal["text"]
    text: str
    cache_control: Annotated[object, NoEffect()] = None
    citations: Annotated[object, NoEffect()] = None  # of a text that was answered before


class Thinking(Body):
    """What the model thought before; nothing is signed here."""

    type: Literal["thinking"]
    thinking: str
    signature: Annotated[str | None, NoEffect()] = None


class Redacted(Body):
    """Thoughts that only Anthropic can read: left out."""

    type: Literal["redacted_thinking"]
    data: Annotated[str | None, NoEffect()] = None


class ToolUse(Body):
    """A call that the assistant made."""

    type: Literal["tool_use"]
    id: str
    name: Name
    input: dict[str, object] | None = None
    cache_control: Annotated[object, NoEffect()] = None
    caller: Annotated[object, Neutral(({"type": "direct"},))] = None
    toolset_name: Annotated[object, Neutral(())] = None


class Foreign(Body):
    """A block that is no text: refused by its name, whatever is in it."""

    model_config = ConfigDict(extra="ignore")
    type: str


def _listed(value: object) -> object:
    """A text stands for one block of it."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _kind(value: object) -> str:
    said = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return said if said in KINDS else "other"


KINDS = ("text", "thinking", "redacted_thinking", "tool_use", "tool_result")
Plain = Annotated[
    Annotated[Text, Tag("text")] | Annotated[Foreign, Tag("other")],
    Discriminator(lambda value: "text" if _kind(value) == "text" else "other"),
]
Texts = Annotated[list[Plain], LIST, BeforeValidator(_listed)]


class ToolResult(Body):
    """What a tool answered."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts | None = None
    is_error: bool | None = None
    cache_control: Annotated[object, NoEffect()] = None
    toolset_name: Annotated[object, Neutral(())] = None


Block = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[Thinking, Tag("thinking")]
    | Annotated[Redacted, Tag("redacted_thinking")]
    | Annotated[ToolUse, Tag("tool_use")]
    | Annotated[ToolResult, Tag("tool_result")]
    | Annotated[Foreign, Tag("other")],
    Discriminator(_kind),
]


class Turn(Body):
    """One message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Block], LIST, BeforeValidator(_listed)]


class ToolDefinition(Body):
    """A tool that the client runs."""

    type: str | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, object] | None = None
    strict: bool | None = None  # calls always obey their schema
    cache_control: Annotated[object, NoEffect()] = None
    eager_input_streaming: Annotated[bool | None, NoEffect()] = None  # it always is
    allowed_callers: Annotated[list[str] | None, Field(fail_fast=True), Neutral(CALLERS)] = None
    defer_loading: Annotated[bool | None, Neutral((False,))] = None
    input_examples: Annotated[list[object] | None, Neutral(([],))] = None


class ServerTool(Body):
    """A tool that Anthropic's servers run."""

    model_config = ConfigDict(extra="ignore")
    type: str


def _who_runs(value: object) -> str:
    said = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return "client" if said in (None, "custom") else "server"


AnyTool = Annotated[
    Annotated[ToolDefinition, Tag("client")] | Annotated[ServerTool, Tag("server")],
    Discriminator(_who_runs),
]


class ToolChoice(Body):
    """Which tool is to be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingChoice(Body):
    """Is the model to think first?"""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int | None, NoEffect()] = None  # templates know of no such budget
    display: Literal["summarized", "omitted"] | None = (
        None  # there is no summary: all is shown, or none
    )


class Format(Body):
    """A schema that the reply obeys."""

    type: Literal["json_schema"]
    schema_: dict[str, object] = Field(alias="schema")


class OutputConfig(Body):
    """How much effort, and in what form."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: Format | None = None


class CountTokens(Body):
    """The body of /v1/messages/count_tokens."""

    model: Name | None = None
    messages: Annotated[list[Turn], Field(fail_fast=True, min_length=1, max_length=MOST_MESSAGES)]
    system: Texts | None = None
    tools: Annotated[list[AnyTool] | None, Field(fail_fast=True, max_length=MOST_TOOLS)] = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingChoice | None = None
    output_config: OutputConfig | None = None
    cache_control: Annotated[object, NoEffect()] = None
    speed: Annotated[str | None, Neutral(("standard",))] = None
    user_profile_id: Annotated[str | None, NoEffect()] = None
    workspace_id: Annotated[str | None, NoEffect()] = None
    context_management: Annotated[object, Neutral(())] = None
    mcp_servers: Annotated[object, Neutral(([],))] = None
    compaction: Annotated[object, Neutral(())] = None
    billing_policy: Annotated[object, Neutral(())] = None


class Create(CountTokens):
    """The body of /v1/messages."""

    max_tokens: int
    stop_sequences: Annotated[list[Stop] | None, Field(fail_fast=True, max_length=16)] = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    metadata: Annotated[object, NoEffect()] = None
    service_tier: Annotated[Literal["auto", "standard_only"] | None, NoEffect()] = None
    container: Annotated[object, Neutral(())] = None
    diagnostics: Annotated[object, Neutral(())] = None
    inference_geo: Annotated[str | None, Neutral((), "outsize computes where it runs")] = None
    fallback_credit_token: Annotated[object, Neutral(())] = None
    fallbacks: Annotated[object, Neutral(([],))] = None
    thread: Annotated[object, Neutral(())] = None
