"""The body of POST /v1/responses, field by field. No response is kept, so what refers to one is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag

from outsize.serve.openai_schema import MOST_MESSAGES, MOST_TOOLS, Text
from outsize.serve.schema import Body, Neutral, NoEffect, few

ABSENT = Neutral(())
STATELESS = Neutral((), "this server keeps no responses: send the whole conversation as `input`")
STATUS = Annotated[str | None, NoEffect()]
Ignored = Annotated[Any, NoEffect()]


class Foreign(Body):
    """An item or a part that is no text: refused by its name, whatever is in it."""

    model_config = ConfigDict(extra="ignore")
    type: str = ""


def _said(value: object) -> object:
    """The type that an item says it has; with a role and without a type it is a message."""
    if not isinstance(value, Mapping):
        return getattr(value, "type", None)
    return value.get("type") or ("message" if "role" in value else None)


class Words(Body):
    """A part of a message, of reasoning or of a tool's output, that is text."""

    type: Literal["input_text", "output_text", "text", "summary_text", "reasoning_text"]
    text: str
    annotations: Ignored = None
    logprobs: Ignored = None
    prompt_cache_breakpoint: Ignored = None


class Refusal(Body):
    """What the assistant said instead of an answer."""

    type: Literal["refusal"]
    refusal: str


def _part(value: object) -> str:
    said = _said(value)
    return "text" if said in TEXTS else "refusal" if said == "refusal" else "other"


def _listed(value: object) -> object:
    """A text stands for one part of it."""
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
Part = Annotated[
    Annotated[Words, Tag("text")]
    | Annotated[Refusal, Tag("refusal")]
    | Annotated[Foreign, Tag("other")],
    Discriminator(_part),
]
Parts = Annotated[
    list[Part], Field(fail_fast=True, max_length=MOST_MESSAGES), BeforeValidator(_listed)
]


class Message(Body):
    """A message; with a role, its type may be left out."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Parts
    id: Ignored = None
    status: STATUS = None
    phase: Annotated[Literal["commentary", "final_answer"] | None, NoEffect()] = None


class FunctionCall(Body):
    """A call that the assistant made; its arguments are a text of JSON."""

    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: str
    id: Ignored = None
    status: STATUS = None
    caller: Annotated[Any, Neutral(({"type": "direct"},))] = None
    namespace: Annotated[Any, ABSENT] = None
    async_: Annotated[bool | None, Field(alias="async"), Neutral((False,))] = None


class FunctionOutput(Body):
    """What a tool answered."""

    type: Literal["function_call_output"]
    call_id: Text
    output: Parts
    name: Text | None = None
    id: Ignored = None
    status: STATUS = None
    caller: Annotated[Any, Neutral(({"type": "direct"},))] = None
    namespace: Annotated[Any, ABSENT] = None


class Reasoning(Body):
    """What the model thought before."""

    type: Literal["reasoning"]
    summary: Parts | None = None
    content: Parts | None = None
    encrypted_content: Ignored = None  # of another server: nobody here can read it
    id: Ignored = None
    status: STATUS = None


ITEMS = ("message", "function_call", "function_call_output", "reasoning")


def _item(value: object) -> str:
    said = _said(value)
    return str(said) if said in ITEMS else "other"


Item = Annotated[
    Annotated[Message, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionOutput, Tag("function_call_output")]
    | Annotated[Reasoning, Tag("reasoning")]
    | Annotated[Foreign, Tag("other")],
    Discriminator(_item),
]


def _items(value: object) -> object:
    """A text stands for the user's message; nothing, for an empty one."""
    value = "" if value is None else value
    return (
        [{"type": "message", "role": "user", "content": value}] if isinstance(value, str) else value
    )


class Tool(Body):
    """A tool that the client runs."""

    type: Literal["function"]
    name: Text
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # calls always obey their schema
    allowed_callers: Annotated[
        list[str] | None, Field(fail_fast=True), Neutral((["direct"], []))
    ] = None
    defer_loading: Annotated[bool | None, Neutral((False,))] = None
    output_schema: Annotated[dict[str, Any] | None, ABSENT] = None
    async_: Annotated[bool | None, Field(alias="async"), Neutral((False,))] = None


def _tool(value: object) -> str:
    return "function" if _said(value) == "function" else "other"


AnyTool = Annotated[
    Annotated[Tool, Tag("function")] | Annotated[Foreign, Tag("other")], Discriminator(_tool)
]


class NamedTool(Body):
    """A tool by its name."""

    type: Literal["function"]
    name: Text


class AllowedTools(Body):
    """The tools that may be called, of those that are there."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(fail_fast=True, max_length=MOST_TOOLS)]


class Format(Body):
    """What the reply looks like."""

    type: Literal["text", "json_object", "json_schema"]
    name: Text | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextConfig(Body):
    """The reply's form."""

    format: Format | None = None
    verbosity: Annotated[Text | None, Neutral(("medium",))] = None


class ReasoningConfig(Body):
    """How much the model is to think."""

    effort: Text | None = None
    summary: Annotated[Literal["auto", "concise", "detailed"] | None, NoEffect()] = (
        None  # all is told
    )
    generate_summary: Annotated[Literal["auto", "concise", "detailed"] | None, NoEffect()] = None
    context: Annotated[Text | None, Neutral(("auto",))] = None
    mode: Annotated[Text | None, Neutral(("standard",))] = None


class StreamOptions(Body):
    """What a stream tells beside the text."""

    include_obfuscation: Annotated[bool | None, Neutral((False,), "events are not padded")] = None


class Create(Body):
    """The body."""

    model: Text | None = None
    input: Annotated[
        list[Item],
        Field(fail_fast=True, min_length=1, max_length=MOST_MESSAGES, validate_default=True),
        BeforeValidator(_items),
    ] = ""  # type: ignore[assignment]  # OpenAI's type lets it be absent, too
    instructions: str | None = None
    max_output_tokens: Annotated[int | None, Field(ge=1, le=1 << 24)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    tools: Annotated[list[AnyTool] | None, Field(fail_fast=True, max_length=MOST_TOOLS)] = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    include: Annotated[list[Text] | None, Field(fail_fast=True, max_length=16)] = None
    store: Annotated[bool | None, NoEffect()] = None  # told to be false
    metadata: Annotated[dict[str, str] | None, BeforeValidator(few), NoEffect()] = None
    user: Annotated[str | None, NoEffect()] = None
    safety_identifier: Annotated[str | None, NoEffect()] = None
    prompt_cache_key: Annotated[str | None, NoEffect()] = None
    prompt_cache_options: Annotated[dict[str, Any] | None, NoEffect()] = None
    prompt_cache_retention: Annotated[Text | None, NoEffect()] = None
    service_tier: Annotated[Text | None, Neutral(("auto", "default"))] = None
    truncation: Annotated[
        Text | None, Neutral(("disabled",), "outsize never cuts what it is given")
    ] = None
    background: Annotated[bool | None, Neutral((False,), "this server keeps no responses")] = None
    previous_response_id: Annotated[Text | None, STATELESS] = None
    conversation: Annotated[Any, STATELESS] = None
    prompt: Annotated[Any, Neutral((), "this server keeps no prompts")] = None
    max_tool_calls: Annotated[int | None, Neutral((), "the client runs all tools")] = None
    background_options: Annotated[Any, ABSENT] = None
    context_management: Annotated[Any, Neutral(([],))] = None
    moderation: Annotated[Any, ABSENT] = None
    access_programs: Annotated[Any, ABSENT] = None
    image: Annotated[Any, ABSENT] = None
