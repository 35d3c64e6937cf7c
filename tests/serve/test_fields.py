"""Each field of OpenAI's own types has one of three fates: it is honoured, and the effect is seen; it is
accepted at a neutral value, and any other is refused by name; or by its nature it changes nothing here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_type_hints

import httpx
import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params

from tests.serve.ask import CHAT, TEXT, asked, chat, refused, streamed, text
from tests.serve.conftest import Serving

BAN = {"a": 1}
TOOLS = [{"type": "function", "function": {"name": "f"}}]
# By name: values that are accepted, and values that are refused by this name.
NEUTRAL: dict[str, tuple[list[Any], list[Any]]] = {
    "audio": ([None], [{"voice": "alloy", "format": "wav"}]),
    "modalities": ([None, ["text"]], [["text", "audio"], []]),
    "prediction": ([None], [{"type": "content", "content": "a"}]),
    "web_search_options": ([None], [{}]),
    "moderation": ([None], [{"model": "a"}]),
    "functions": ([None, []], [[{"name": "f"}]]),
    "function_call": ([None, "none"], ["auto", {"name": "f"}]),
    "store": ([None, False], [True]),
    "service_tier": ([None, "auto", "default"], ["flex", "priority"]),
    "verbosity": ([None, "medium"], ["low", "high"]),
}
NEUTRAL_IN_TEXT: dict[str, tuple[list[Any], list[Any]]] = {
    "suffix": ([None, ""], ["end"]),
    "best_of": ([None, 1], [3]),
}
WITHOUT_EFFECT: dict[str, Any] = {
    "user": "me", "metadata": {"a": "b"}, "safety_identifier": "me", "prompt_cache_key": "a",
    "prompt_cache_retention": "24h", "prompt_cache_options": {"mode": "implicit"},
}  # fmt: skip
# By name: values that are refused; what good values do is each tested below, or where it is said.
HONOURED: dict[str, list[Any]] = {
    "messages": [None], "model": [3, "x" * 2000], "frequency_penalty": [2.1, "a", True],
    "presence_penalty": [-2.1], "logit_bias": [{"1": 101}, {"a": 1}, {"288": 1}, {"-1": 1}, [1]],
    "logprobs": ["a"], "max_completion_tokens": [0, -1, 1.5, "5"], "max_tokens": [0, -1, 1.5, "5"],
    "n": [0, 17, "2"], "parallel_tool_calls": [1], "reasoning_effort": [3], "response_format": ["json"],
    "seed": ["1", 1.5, 1 << 64], "stop": [3, [""], [3], ["a"] * 17, "x" * 2000], "stream": ["yes"],
    "stream_options": [{"include_usage": True}, 3], "temperature": [-0.1, 2.1, "hot", 10**400],
    "tool_choice": ["f", {"type": "function", "function": {"name": "g"}}, "required"],
    "tools": [3, [{"type": "web_search"}], TOOLS * 2], "top_logprobs": [-1, 21], "top_p": [-0.1, 1.1],
}  # fmt: skip
HONOURED_IN_TEXT: dict[str, list[Any]] = {
    "prompt": [None, 3, [], [[]], ["a", 1], [[288]], [-1], [1.5]], "echo": ["a"], "logprobs": [21, True],
    "max_tokens": [-1, "5", 0],
}  # fmt: skip
OTHERS = {
    "top_k": [-2], "min_p": [2], "repeat_penalty": [0], "repetition_penalty": [101], "ignore_eos": [1],
    "repeat_last_n": [-2], "prefill": [3, "quick", "lazy:keep=2"], "width": [0, 1.5, "wide", True],
}  # fmt: skip  # not OpenAI's, but llama.cpp's and vLLM's


def names(*kinds: Any) -> set[str]:
    return {name for kind in kinds for name in get_type_hints(kind)}


def test_no_field_of_theirs_is_unknown() -> None:
    theirs = names(
        chat_params.CompletionCreateParamsNonStreaming, chat_params.CompletionCreateParamsStreaming
    )
    assert theirs == {*NEUTRAL, *WITHOUT_EFFECT, *HONOURED}
    theirs = names(
        text_params.CompletionCreateParamsNonStreaming, text_params.CompletionCreateParamsStreaming
    )
    ours = {*NEUTRAL, *WITHOUT_EFFECT, *HONOURED, *NEUTRAL_IN_TEXT, *HONOURED_IN_TEXT}
    assert theirs <= ours


def pairs(table: dict[str, tuple[list[Any], list[Any]]], which: int) -> list[tuple[str, Any]]:
    return [(name, value) for name, values in table.items() for value in values[which]]


@pytest.mark.parametrize(("name", "value"), pairs(NEUTRAL, 0))
def test_neutral(client: httpx.Client, name: str, value: Any) -> None:
    asked(client, CHAT, chat(**{name: value}))


@pytest.mark.parametrize(("name", "value"), pairs(NEUTRAL, 1))
def test_not_neutral(client: httpx.Client, name: str, value: Any) -> None:
    error = refused(client, CHAT, chat(**{name: value}))
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


@pytest.mark.parametrize(("name", "value"), pairs(NEUTRAL_IN_TEXT, 0))
def test_neutral_in_text(client: httpx.Client, name: str, value: Any) -> None:
    asked(client, TEXT, text(**{name: value}))


@pytest.mark.parametrize(("name", "value"), pairs(NEUTRAL_IN_TEXT, 1))
def test_not_neutral_in_text(client: httpx.Client, name: str, value: Any) -> None:
    assert refused(client, TEXT, text(**{name: value}))["param"] == name


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_without_effect(client: httpx.Client, name: str) -> None:
    body = chat(seed=1, temperature=1)
    plain, given = (
        asked(client, CHAT, body),
        asked(client, CHAT, {**body, name: WITHOUT_EFFECT[name]}),
    )
    assert plain["choices"] == given["choices"]


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, vs in {**HONOURED, **OTHERS}.items() for v in vs]
)
def test_bad_values_are_refused_by_name(client: httpx.Client, name: str, value: Any) -> None:
    more = {"tools": TOOLS} if name == "tool_choice" and value != "required" else {}
    error = refused(client, CHAT, chat(**{**more, name: value}))
    assert (error["param"] or "").partition(".")[0] == name


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, vs in HONOURED_IN_TEXT.items() for v in vs]
)
def test_bad_values_in_text(client: httpx.Client, name: str, value: Any) -> None:
    error = refused(client, TEXT, text(**{name: value}))
    assert (error["param"] or "prompt").partition(".")[0] == name


@pytest.mark.parametrize("name", [*HONOURED, *NEUTRAL, *WITHOUT_EFFECT, *OTHERS])
def test_null_is_absent(client: httpx.Client, name: str) -> None:
    if name not in ("messages", "max_tokens", "temperature"):
        body = chat()
        assert (
            asked(client, CHAT, {**body, name: None})["choices"]
            == asked(client, CHAT, body)["choices"]
        )


def content(made: Any) -> str:
    said: str = made["choices"][0]["message"]["content"]
    return said


Check = Callable[[str, str], bool]
EFFECTS: dict[str, tuple[dict[str, Any], dict[str, Any], Check]] = {
    # name: (a body's more, more than that with the field, what is so of the two texts)
    "temperature": ({"seed": 1}, {"temperature": 2}, lambda a, b: a != b),
    "seed": ({"temperature": 1.5, "seed": 1}, {"seed": 2}, lambda a, b: a != b),
    "negative seed": ({"temperature": 1.5, "seed": -1}, {"seed": (1 << 63) - 1}, lambda a, b: a == b),
    "top_p": ({"temperature": 2, "seed": 3}, {"top_p": 0.0}, lambda a, b: a != b),
    "top_k": ({"temperature": 2, "seed": 3}, {"top_k": 1}, lambda a, b: a != b),
    "top_k off": ({"temperature": 2, "seed": 3, "top_k": 0}, {"top_k": -1}, lambda a, b: a == b),
    "min_p": ({"temperature": 2, "seed": 3}, {"min_p": 1.0}, lambda a, b: a != b),
    "logit_bias": ({}, {"logit_bias": {"65": 100}}, lambda a, b: len(set(b)) == 1 and a != b),
    "presence_penalty": ({"logit_bias": {"65": 40, "66": 39}}, {"presence_penalty": 2},
                         lambda a, b: a != b),
    "frequency_penalty": ({"logit_bias": {"65": 40, "66": 38}}, {"frequency_penalty": 2},
                          lambda a, b: a != b),
    "repeat_penalty": ({"logit_bias": {"65": 40, "66": 39}}, {"repeat_penalty": 50},
                       lambda a, b: a != b),
    "repetition_penalty": ({"repeat_penalty": 3}, {"repeat_penalty": None, "repetition_penalty": 3},
                           lambda a, b: a == b),
    "max_tokens": ({}, {"max_tokens": 3}, lambda a, b: a != b and a.startswith(b)),
    "max_completion_tokens": ({"max_tokens": None, "max_completion_tokens": 20}, {"max_completion_tokens": 3},
                              lambda a, b: a != b and a.startswith(b)),
    "chat_template_kwargs": ({}, {"chat_template_kwargs": {"shout": True}}, lambda a, b: a == b),
}  # fmt: skip


@pytest.mark.parametrize("name", EFFECTS)
def test_effects(client: httpx.Client, name: str) -> None:
    before, change, is_so = EFFECTS[name]
    body = chat(**{"max_tokens": 20, **before})
    plain, changed = (
        content(asked(client, CHAT, body)),
        content(asked(client, CHAT, {**body, **change})),
    )
    assert is_so(plain, changed), (plain, changed)


def test_the_end_token_is_passed_over(client: httpx.Client) -> None:
    ends = chat(logit_bias={"257": 100}, max_tokens=4)
    made = asked(client, CHAT, ends)
    assert made["choices"][0]["finish_reason"] == "stop"
    made = asked(client, CHAT, {**ends, "ignore_eos": True})
    assert made["choices"][0]["finish_reason"] == "length"
    assert made["usage"]["completion_tokens"] == 4


def test_two_names_of_one_thing(client: httpx.Client) -> None:
    asked(client, CHAT, chat(repeat_penalty=2.0, repetition_penalty=2.0))
    error = refused(client, CHAT, chat(repeat_penalty=2.0, repetition_penalty=3.0))
    assert "two names" in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "hint"),
    [
        (chat(temprature=1), "temprature", "'temperature'"),
        (chat(max_token=1), "max_token", "max_tokens"),
        (chat(nonsense=1), "nonsense", ""),
        (chat(stream=True, stream_options={"include_usages": True}), "stream_options.include_usages",
         "'include_usage'"),
        (chat(messages=[{"role": "user", "contents": "a", "content": "b"}]), "messages.0.contents",
         "'content'"),
        (chat(stream=True, stream_options={"continuous_usage_stats": True}),
         "stream_options.continuous_usage_stats", "once"),
    ],
)  # fmt: skip
def test_unknown_fields(client: httpx.Client, body: Any, param: str, hint: str) -> None:
    error = refused(client, CHAT, body)
    assert (error["param"], error["code"]) == (param, "unsupported_parameter")
    assert hint in error["message"]
    assert param in error["message"]


def test_unknown_fields_leniently(serve: Serving) -> None:
    running = serve(lenient=True).until_ready()
    with running.client() as client:
        reply = client.post(CHAT, json=chat(nonsense=1, more={"a": 1}, nothing=None))
        assert reply.status_code == 200
        assert reply.headers["x-outsize-ignored"] == "nonsense,more"
        reply = client.post(CHAT, json=chat(**{"a\r\nset-cookie: b": 1, "ä" * 2000: 1}))
        assert reply.status_code == 200
        assert "set-cookie" not in reply.headers
        refused(client, CHAT, chat(store=True))
        refused(client, CHAT, chat(temperature=3))


def test_what_the_template_does_not_know(client: httpx.Client) -> None:
    reply = client.post(CHAT, json=chat(reasoning_effort="low"))
    assert reply.status_code == 200
    assert reply.headers["x-outsize-ignored"] == "reasoning_effort"


def test_a_message_to_go_on_with(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    plain = asked(client, CHAT, chat(messages=messages))
    goes_on = chat(messages=messages, continue_final_message=True, add_generation_prompt=False)
    made = asked(client, CHAT, goes_on)
    assert made["usage"]["prompt_tokens"] < plain["usage"]["prompt_tokens"]
    refused(client, CHAT, {**goes_on, "add_generation_prompt": True})
    refused(client, CHAT, chat(add_generation_prompt=False))
    error = refused(client, CHAT, chat(messages=[*messages, messages[-1]]))
    assert "last two" in error["message"]
    error = refused(client, CHAT, chat(continue_final_message=True))
    assert error["param"] == "continue_final_message"


def test_streams_take_the_same_fields(client: httpx.Client) -> None:
    body = chat(temperature=1.3, seed=11, top_p=0.9, stop=["zz"], max_tokens=20)
    said = "".join(
        c["choices"][0]["delta"].get("content") or "" for c in streamed(client, CHAT, body)
    )
    assert said == content(asked(client, CHAT, body))
