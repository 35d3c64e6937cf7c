"""The bodies of Ollama's /api/chat, /api/generate and the endpoints about models, field by field."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from outsize.serve.openai_schema import MOST_IDS, MOST_MESSAGES, MOST_TOOLS, Stop
from outsize.serve.schema import Body, Neutral, NoEffect

NO_IMAGES = Neutral(([],), "this model reads text alone")
NEVER_CUTS = Neutral(
    (False,), "outsize never cuts a prompt, nor drops what does not fit the context"
)
Name = Annotated[str | None, Field(max_length=1000)]
Count = Annotated[int | None, NoEffect()]
Flag = Annotated[bool | None, NoEffect()]


class Settings(Body):
    """The field `options`."""

    temperature: Annotated[float | None, Field(ge=0, le=100)] = None
    top_k: Annotated[int | None, Field(ge=0, le=1 << 24)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    seed: Annotated[int | None, Field(ge=-(1 << 63), lt=1 << 63)] = None  # below 0: any
    num_predict: Annotated[int | None, Field(ge=-2, le=1 << 24)] = None  # -1, -2: to the end
    num_ctx: Annotated[int | None, Field(ge=1)] = (
        None  # the context is the server's; it must hold this
    )
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=16)] | None = None
    repeat_penalty: Annotated[float | None, Field(ge=0.01, le=100)] = None
    repeat_last_n: Annotated[int | None, Field(ge=-1, le=1 << 24)] = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    # Of a machine, not of an answer: named in x-outsize-ignored where they are given.
    num_batch: Count = None
    num_gpu: Count = None
    main_gpu: Count = None
    num_thread: Count = None
    num_keep: Count = None  # of a prompt that is cut, and none is
    numa: Flag = None
    low_vram: Flag = None
    f16_kv: Flag = None
    use_mmap: Flag = None
    use_mlock: Flag = None
    mirostat_tau: Annotated[float | None, NoEffect()] = None  # of mirostat, and it is off
    mirostat_eta: Annotated[float | None, NoEffect()] = None
    mirostat: Annotated[int | None, Neutral((0,))] = None
    tfs_z: Annotated[float | None, Neutral((1,))] = None
    typical_p: Annotated[float | None, Neutral((1,))] = None
    penalize_newline: Annotated[bool | None, Neutral((True,))] = None
    logits_all: Annotated[bool | None, Neutral((False,))] = None
    vocab_only: Annotated[bool | None, Neutral((False,))] = None
    embedding_only: Annotated[bool | None, Neutral((False,))] = None


class Request(Body):
    """What chat and generate share."""

    model: Name = None
    stream: bool | None = None  # True where it is not given
    format: str | dict[str, Any] | None = None
    options: Settings | None = None
    keep_alive: float | str | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    truncate: Annotated[bool | None, NEVER_CUTS] = None
    shift: Annotated[bool | None, NEVER_CUTS] = None
    debug_render_only: Annotated[
        bool | None, Neutral((False,)), Field(alias="_debug_render_only")
    ] = None


class Function(Body):
    """The function of a call; its arguments are an object."""

    name: str
    arguments: dict[str, Any] | None = None
    index: Annotated[int | None, NoEffect()] = None


class ToolCall(Body):
    """A call that the assistant made."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: Function


class Message(Body):
    """One message of a chat."""

    role: str
    content: str | None = None
    thinking: str | None = None
    tool_calls: Annotated[list[ToolCall] | None, Field(fail_fast=True, max_length=MOST_TOOLS)] = (
        None
    )
    tool_name: str | None = None
    tool_call_id: str | None = None
    images: Annotated[list[Any] | None, NO_IMAGES] = None


class FunctionDefinition(Body):
    """A function that may be called."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # calls always obey their schema


class Tool(Body):
    """A tool that may be called."""

    type: Literal["function"] | None = None
    function: FunctionDefinition
    items: Annotated[Any, Neutral(())] = None


class Chat(Request):
    """The body of /api/chat."""

    messages: Annotated[list[Message] | None, Field(fail_fast=True, max_length=MOST_MESSAGES)] = (
        None
    )
    tools: Annotated[list[Tool] | None, Field(fail_fast=True, max_length=MOST_TOOLS)] = None


class Generate(Request):
    """The body of /api/generate."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    context: Annotated[list[int] | None, Field(fail_fast=True, max_length=MOST_IDS)] = (
        None  # of an answer before, which is gone on with
    )
    suffix: Annotated[str | None, Neutral(("",), "outsize does not fill in between two texts")] = (
        None
    )
    template: Annotated[str | None, Neutral(("",), "the model's own chat template is used")] = None
    images: Annotated[list[Any] | None, NO_IMAGES] = None
    width: Annotated[int | None, Neutral((0,), "this model makes text alone")] = None
    height: Annotated[int | None, Neutral((0,), "this model makes text alone")] = None
    steps: Annotated[int | None, Neutral((0,), "this model makes text alone")] = None


class Embed(Body):
    """The bodies of /api/embed and /api/embeddings."""

    model: Name = None
    input: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    prompt: str | None = None
    truncate: bool | None = None
    dimensions: int | None = None
    options: Settings | None = None
    keep_alive: float | str | None = None


class Named(Body):
    """A body that names a model: of /api/show and /api/pull. (`name` is what it was called before.)"""

    model: Name = None
    name: Name = None
    stream: bool | None = None
    verbose: Annotated[bool | None, NoEffect()] = None
    insecure: Annotated[bool | None, NoEffect()] = None
    username: Annotated[str | None, NoEffect()] = None
    password: Annotated[str | None, NoEffect()] = None
    system: Annotated[str | None, Neutral(("",))] = None
    template: Annotated[str | None, Neutral(("",))] = None
    options: Annotated[dict[str, Any] | None, Neutral(({},))] = None
