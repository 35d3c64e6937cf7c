"""OpenAI's text completions: prompts of every kind, with what is asked for beside them."""

from __future__ import annotations

import itertools
from typing import Any

import httpx
import openai
import pytest

from tests.serve.ask import TEXT, asked, refused, streamed, text
from tests.serve.conftest import Running

IDS = [65, 66, 67, 68]
PROMPTS: dict[str, Any] = {
    "text": "hello", "texts": ["hello", "other text"], "ids": IDS, "lists of ids": [IDS, [70, 71], IDS],
}  # fmt: skip


def joined(chunks: list[Any], number: int) -> dict[str, Any]:
    """A choice as its chunks make it."""
    mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == number]
    made: dict[str, Any] = {"text": "".join(c["text"] for c in mine)}
    made["finish_reason"] = mine[-1]["finish_reason"]
    assert all(c["finish_reason"] is None for c in mine[:-1])
    given = [c["logprobs"] for c in mine if c["logprobs"] is not None]
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    made["logprobs"] = {n: [x for part in given for x in part[n]] for n in names} if given else None
    return made


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(
    ("echo", "logprobs", "n"), [*itertools.product((False, True), (None, 0, 2), (1, 2))]
)
def test_combinations(
    client: httpx.Client, prompt: str, echo: bool, logprobs: int | None, n: int
) -> None:
    given = PROMPTS[prompt]
    count = (len(given) if prompt in ("texts", "lists of ids") else 1) * n
    body = text(given, echo=echo, logprobs=logprobs, n=n, temperature=1.2, seed=5)
    whole = asked(client, TEXT, body)
    chunks = streamed(client, TEXT, body)
    assert [choice["index"] for choice in whole["choices"]] == list(range(count))
    assert whole["usage"]["completion_tokens"] == 5 * count
    for choice in whole["choices"]:
        number = choice.pop("index")
        assert joined(chunks, number) == choice
        first = given[number // n] if prompt in ("texts", "lists of ids") else given
        _check(choice, first, echo, logprobs)


def _check(choice: Any, prompt: Any, echo: bool, logprobs: int | None) -> None:
    said = prompt if isinstance(prompt, str) else None
    if echo and said is not None:
        assert choice["text"].startswith(said)
    if logprobs is None:
        assert choice["logprobs"] is None
        return
    found = choice["logprobs"]
    before = len(prompt) if echo else 0  # a token is a byte here
    assert {len(found[name]) for name in found} == {before + 5}
    assert found["text_offset"][: before + 1] == list(range(before + 1))
    assert (found["token_logprobs"][0] is None) is echo
    for token, value, top in zip(
        *(found[n][echo:] for n in ("tokens", "token_logprobs", "top_logprobs")), strict=True
    ):
        assert top[token] == value <= 0
        assert logprobs <= len(top) <= logprobs + 1


def test_the_prompt_alone(client: httpx.Client) -> None:
    body = text("hello", echo=True, max_tokens=0, logprobs=1)
    made = asked(client, TEXT, body)
    assert made["choices"][0]["text"] == "hello"
    assert made["choices"][0]["logprobs"]["tokens"] == list("hello")
    assert made["usage"]["completion_tokens"] == 0
    assert joined(streamed(client, TEXT, body), 0)["text"] == "hello"
    assert refused(client, TEXT, text(max_tokens=0))["param"] == "max_tokens"


def test_log_probabilities_are_those_of_score(client: httpx.Client, served: Running) -> None:
    made = asked(client, TEXT, text(IDS, echo=True, logprobs=1, max_tokens=1))
    service = served.host.running
    assert service is not None
    values, _ = service.model.score_tokens(IDS)
    found = made["choices"][0]["logprobs"]["token_logprobs"]
    assert found[0] is None
    assert found[1 : len(IDS)] == pytest.approx(values, abs=1e-4)


def test_the_end_has_a_log_probability(client: httpx.Client) -> None:
    """lm-eval asks for one token beside the prompt's, and leaves out the last, whatever it is."""
    body = text(IDS, echo=True, logprobs=0, max_tokens=3, logit_bias={"257": 100})
    for made in (asked(client, TEXT, body)["choices"][0], joined(streamed(client, TEXT, body), 0)):
        assert made["finish_reason"] == "stop"
        assert made["logprobs"]["tokens"] == [*made["text"], "</s>"]
        assert len(made["text"]) == len(IDS)
        assert made["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]


def test_defaults(client: httpx.Client) -> None:
    made = asked(client, TEXT, {"prompt": "hello", "ignore_eos": True})
    assert made["usage"]["completion_tokens"] == 16
    assert made["id"].startswith("cmpl-")
    assert made["object"] == "text_completion"


def test_names_of_control_tokens_are_text(client: httpx.Client) -> None:
    made = asked(client, TEXT, text("<s>"))
    assert made["usage"]["prompt_tokens"] == 3


def test_too_many_choices(client: httpx.Client) -> None:
    assert refused(client, TEXT, text(["a"] * 2000, n=16))["param"] == "prompt"
    assert refused(client, TEXT, text(["a"] * 5000))["param"] == "prompt"


def test_too_long_a_prompt_among_others(client: httpx.Client) -> None:
    error = refused(client, TEXT, text(["a", "b" * 600]))
    assert error["code"] == "context_length_exceeded"


def test_the_client(served: Running) -> None:
    """Not strictly: its type of a chunk has a reason in each, which OpenAI's own chunks have not."""
    sdk = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
    made = sdk.completions.create(model="other", prompt="hello", max_tokens=8, temperature=0)
    parts = sdk.completions.create(
        model="other", prompt="hello", max_tokens=8, temperature=0, stream=True
    )
    assert "".join(part.choices[0].text for part in parts) == made.choices[0].text
    assert made.usage is not None
    assert made.usage.completion_tokens == 8
